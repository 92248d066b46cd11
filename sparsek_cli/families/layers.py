"""Which layers of a model attend to everything: the ones that are converted.

Layers are named as transformers names them (`layer_types`). Those that slide, and those that keep
a state instead of keys, stay what they are, with a cache of their own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sparsek_cli.errors import UsageError
from sparsek_cli.families.own_config import has_key, own_config
from sparsek_cli.families.row import Row

# "hybrid": a layer with both attention and a state-space block.
FULL = ("full_attention", "hybrid")
_KNOWN = {*FULL, "sliding_attention", "linear_attention", "conv", "moe", "mlp"}


def full_layers(types: Sequence[str], shared: int = 0) -> tuple[int, ...]:
    """Indices of the layers that attend to everything; without the last `shared` layers."""
    own = types[: len(types) - shared]
    return tuple(layer for layer, kind in enumerate(own) if kind in FULL)


def storing_layers(types: Sequence[str], shared: int) -> dict[int, int]:
    """By layer that attends to everything in another one's keys: that other one.

    Of the last `shared` layers, which read the last one before them of their kind.
    """
    own = full_layers(types, shared)
    return {layer: own[-1] for layer in full_layers(types)[len(own) :]}


def has_states(types: Sequence[str] | None) -> bool:
    """Whether some layer carries a state from token to token, which knows no documents."""
    return bool({"linear_attention", "conv", "hybrid"} & set(types or ()))


def layer_types(row: Row, config: Mapping[str, Any]) -> list[str]:
    """The types of all layers of a config.json dictionary, after `idle_window_off`.

    Raises:
        UsageError: several, of a family that knows one.
    """
    types = config.get("layer_types")
    one_kind = not types or set(types) == {"full_attention"}
    if not (one_kind or row.mixed or has_key(row, "layer_types")):
        raise stray_types(types, row.model_type)
    if types and set(types) <= _KNOWN:
        return list(types)
    if row.mixed:
        # How its layers alternate is written in many ways, which its own config class knows.
        return list(own_config(row, config).layer_types)
    return ["full_attention"] * config[row.key("num_hidden_layers")]


def stray_types(types: Sequence[str], model_type: str) -> UsageError:
    """What to raise where `layer_types` names kinds of layers that a family does not have."""
    kinds = ", ".join(sorted(set(types) - {"full_attention"}))
    return UsageError(
        f"config.json says in layer_types that some layers are {kinds}, and all layers of "
        f"{model_type} models attend to everything",
        hint="take layer_types out of config.json if the weights were made without, else correct "
        "its model_type",
    )


def given_window(window: Any, key: str) -> int | None:
    """Tokens of a window in config.json; None of what says in some families that there is none.

    Args:
        window: null, false, 0 and less mean none. key: where it stands.

    Raises:
        UsageError: it is no number.
    """
    if window is None or window is False:
        return None
    if window is True or not isinstance(window, int | float):
        raise UsageError(
            f"{key} in config.json is {window!r}, no number of tokens",
            hint=f'write it without quotes, or "{key}": null where there is no window',
        )
    return window if window > 0 else None


def stray_window(key: str, window: int, model_type: str) -> UsageError:
    """What to raise where a window is named of a family that has none."""
    what = {"sliding_window": "a sliding window"}.get(key, f"an {key.replace('_', ' ')}")
    return UsageError(
        f"config.json names {what} of {window} tokens, and {model_type} models have none",
        hint=f'if the weights were made without one, set "{key}": null in config.json; else '
        "correct its model_type",
    )


def no_width(window: Any, *, mixed: bool = False) -> UsageError:
    """What to raise where layers slide over a window that holds not even the token itself.

    Args:
        window: as in config.json. mixed: layers differ by design, whatever the window is.
    """
    none = '"sliding_window": null says so'
    if mixed:
        none = 'name "full_attention" for each in layer_types'
    return UsageError(
        f"sliding_window in config.json is {json.dumps(window)}, and layers of the model slide",
        hint=f"name the window that the weights were made with; where no layer slides, {none}",
    )


def idle_window_off(row: Row, config: Mapping[str, Any], context: int) -> dict[str, Any]:
    """Config keys that switch a sliding window off where no text ever fills it.

    Where only some layers slide, and where layers differ by design, nothing changes.

    Args:
        row: the family. config: its config.json dictionary. context: longest text, tokens.

    Raises:
        UsageError: all layers slide, within the context: the base never learned to look further.
            Or a family without windows is said to slide, or the window is no number.
    """
    if row.mixed:
        return {}
    window = config.get("sliding_window", row.window)
    types = config.get("layer_types") or ()
    none = given_window(window, "sliding_window") is None
    unused = window is None or (none and not has_key(row, "sliding_window"))
    if not unused and window < context and _slides(row, config):
        if not has_key(row, "sliding_window"):
            raise stray_window("sliding_window", window, row.model_type)
        if none:
            raise no_width(window)
        if "full_attention" in types and has_key(row, "layer_types"):
            return {}
        found = _own_types(row, config)
        if "full_attention" in found:
            return {"layer_types": found}
        raise UsageError(
            f"every layer of the model uses a sliding window of {window} tokens",
            hint="its cache is bounded already, and SparseK takes layers that attend to "
            "everything; if the model is known to work without its window, set "
            '"sliding_window": null in its config.json',
        )
    off: dict[str, Any] = {}
    if window is not None:
        off["sliding_window"] = None
        if "use_sliding_window" in config:
            off["use_sliding_window"] = False
    if types and set(types) != {"full_attention"}:
        off["layer_types"] = ["full_attention"] * len(types)
    return off


def _slides(row: Row, config: Mapping[str, Any]) -> bool:
    """Whether a window is in use, by the keys that the family has.

    A switch that only its file has is nobody's, but for a family that has no window either.
    """
    stray = not has_key(row, "sliding_window")
    types = config.get("layer_types")
    if types and (stray or has_key(row, "layer_types")):
        return "sliding_attention" in types
    switched_on = config.get("use_sliding_window", True)
    if switched_on and (found := _own_types(row, config)):
        return "sliding_attention" in found
    return switched_on or not (stray or has_key(row, "use_sliding_window"))


def _own_types(row: Row, config: Mapping[str, Any]) -> list[str]:
    """What the family's class makes of a file that leaves `layer_types` out; empty: nothing.

    Qwen2 counts the first layers that do not slide, say.
    """
    if config.get("layer_types") or not has_key(row, "sliding_window"):
        return []
    if not has_key(row, "layer_types"):
        return []
    return list(own_config(row, config).layer_types or ())
