"""Which layers of a model attend to everything: the ones that are converted.

Layers are named as transformers names them (`layer_types`). Those that slide, and those that keep
a state instead of keys, stay what they are, with a cache of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparsek_cli.errors import UsageError
from sparsek_cli.families.own_config import own_config
from sparsek_cli.families.row import Row

# "hybrid": a layer with both attention and a state-space block.
FULL = ("full_attention", "hybrid")
_KNOWN = {*FULL, "sliding_attention", "linear_attention", "conv", "moe", "mlp"}


def full_layers(types: Sequence[str]) -> tuple[int, ...]:
    """Indices of the layers that attend to everything."""
    return tuple(layer for layer, kind in enumerate(types) if kind in FULL)


def has_states(types: Sequence[str] | None) -> bool:
    """Whether some layer carries a state from token to token, which knows no documents."""
    return bool({"linear_attention", "conv", "hybrid"} & set(types or ()))


def layer_types(row: Row, config: Mapping[str, Any]) -> list[str]:
    """The types of all layers of a config.json dictionary, after `idle_window_off`."""
    types = config.get("layer_types")
    if types and set(types) <= _KNOWN:
        return list(types)
    if row.mixed:
        # How its layers alternate is written in many ways, which its own config class knows.
        return list(own_config(row, config).layer_types)
    return ["full_attention"] * config[row.key("num_hidden_layers")]


def idle_window_off(row: Row, config: Mapping[str, Any], context: int) -> dict[str, Any]:
    """Config keys that switch a sliding window off where no text ever fills it.

    Where only some layers slide, and where layers differ by design, nothing changes.

    Args:
        row: the family. config: its config.json dictionary. context: longest text, tokens.

    Raises:
        UsageError: all layers slide, within the context: the base never learned to look further.
    """
    if row.mixed:
        return {}
    window = config.get("sliding_window", row.window)
    types = config.get("layer_types") or ()
    slides = "sliding_attention" in types if types else config.get("use_sliding_window", True)
    if window is not None and slides and window < context:
        if "full_attention" in types:
            return {}
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
