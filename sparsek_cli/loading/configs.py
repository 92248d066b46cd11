"""config.json as transformers reads it, and what it may not say."""

from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from sparsek_cli.errors import UsageError
from sparsek_cli.families import TABLE
from sparsek_cli.families.by_layer import head_dim_of
from sparsek_cli.families.layers import given_window, stray_types, stray_window
from sparsek_cli.families.own_config import own_value
from sparsek_cli.families.positions import check_scaling
from sparsek_cli.loading.library_errors import readable_errors

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "mlp_hidden_act")


def load_config(path: Path, name: str) -> "PreTrainedConfig":
    """config.json as transformers reads it.

    Raises:
        SparsekError: it needs code of its own, or is no config that transformers knows.
        UsageError: it names an activation function that there is none of, or a window or kinds
            of layers that the family does not have, or a window that is no number; or rotary
            positions are scaled by what scales none.
    """
    from transformers import AutoConfig

    import sparsek_cli.models  # noqa: F401  (registers the sparsek_* model types)

    with readable_errors(name):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    _check_activations(config, name)
    _settle_stray_kinds(config)
    _leave_flash_out(config)
    if config.model_type.removeprefix("sparsek_") in TABLE:
        check_scaling(config.to_dict(), head_dim_of(config, 0), read=True)
    return config


def _settle_stray_kinds(config: "PreTrainedConfig") -> None:
    """A window or kinds of layers of a family that has none: no layer heeds them, its cache does.

    Raises:
        UsageError: they are in use, and a cache would forget what attention asks for; or a window
            is no number.
    """
    kind = config.model_type.removeprefix("sparsek_")
    if kind not in TABLE or TABLE[kind].mixed:
        return
    types = getattr(config, "layer_types", None)
    if types != own_value(config, "layer_types") and {*types} != {"full_attention"}:
        raise stray_types(types, kind)
    for key in ("sliding_window", "attention_chunk_size"):
        window = getattr(config, key, None)
        if window is None or own_value(config, key) is not None:
            continue
        context = getattr(config, "max_position_embeddings", None) or 0
        window = given_window(window, key)
        if window is not None and window < context and getattr(config, "use_sliding_window", True):
            raise stray_window(key, window, kind)
        setattr(config, key, None)


def _leave_flash_out(config: "PreTrainedConfig") -> None:
    """What computes attention depends on the machine: flash-attn, which config.json may name from
    where it was saved, is mostly not installed, and knows no float32. transformers chooses then.
    """
    if "flash" in str(getattr(config, "_attn_implementation", None)):
        config._attn_implementation = None


def _check_activations(config: "PreTrainedConfig", name: str) -> None:
    """Raises UsageError where a function is named that transformers does not have."""
    from transformers.activations import ACT2FN

    for key in _ACTIVATIONS:
        found = own_value(config, key)
        if isinstance(found, str) and found not in ACT2FN:
            near = get_close_matches(found, list(ACT2FN), n=1)
            meant = f"did you mean '{near[0]}'? " if near else ""
            raise UsageError(
                f"'{name}': {key} in config.json is {found!r}, no activation function that "
                "transformers knows",
                hint=f"{meant}silu, gelu and relu are some",
            )
