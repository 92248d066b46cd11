"""Keys of single layers, where layers differ in them: their number, width, and whose they are.

Gemma 4's layers that attend to everything have KV heads in a number and of a width of their own.
The last layers of Gemma 3n and Gemma 4 have no keys: they read what the last layer of their kind
before them stores. What is asked here are transformers' configs; a row says of which families
(`Row.by_layer`).
"""

from __future__ import annotations

from typing import Any

from sparsek_cli.errors import UsageError
from sparsek_cli.families.installed import transformers_version
from sparsek_cli.families.layers import full_layers
from sparsek_cli.families.own_config import own_value


def layer_config(config: Any, layer: int) -> Any:
    """A config with one layer's own sizes; the whole model's where layers do not differ."""
    if not getattr(config, "is_heterogeneous", False):
        return config
    return config.per_layer_config[layer]


def kv_heads_of(config: Any, layer: int) -> int:
    """KV heads of one layer, for families that do and do not name them."""
    own = layer_config(config, layer)
    return getattr(own, "num_key_value_heads", None) or own.num_attention_heads


def head_dim_of(config: Any, layer: int) -> int:
    """Features of a head of one layer."""
    own = layer_config(config, layer)
    return getattr(own, "head_dim", None) or own.hidden_size // own.num_attention_heads


def pair_features(config: Any, layer: int) -> int:
    """Features of the keys, or of the values, that a token has in one layer."""
    return kv_heads_of(config, layer) * head_dim_of(config, layer)


def shared_layers(config: Any) -> int:
    """How many of the last layers have no keys and values of their own."""
    return own_value(config, "num_kv_shared_layers") or 0


def sizes_by_layer(config: Any) -> dict[str, int]:
    """Config keys of KV heads with the values that they have in the layers that are converted.

    Raises:
        UsageError: these differ among each other, and slots and budgets are counted alike in all;
            or layers share keys that no layer has.
    """
    _check_shared(config)
    layers = full_layers(getattr(config, "layer_types", None) or ())
    sizes = {(kv_heads_of(config, layer), head_dim_of(config, layer)) for layer in layers}
    if len(sizes) > 1:
        found = ", ".join(f"{heads} of {width}" for heads, width in sorted(sizes))
        raise UsageError(
            "layers that attend to everything have KV heads in different numbers or widths "
            f"(per_layer_config in config.json: {found}), where conversion reads one for all",
            hint="name a model in which they are alike",
        )
    heads, width = next(iter(sizes), (kv_heads_of(config, 0), head_dim_of(config, 0)))
    return {"num_key_value_heads": heads, "head_dim": width}


def _check_shared(config: Any) -> None:
    count, types = shared_layers(config), list(config.layer_types)
    if not count:
        return
    if not hasattr(type(config), "kv_sharing_modes"):
        raise UsageError(
            f"transformers {transformers_version()} hands keys from layer to layer otherwise than "
            "SparseK reads them (num_kv_shared_layers)",
            hint="a newer one does as expected: pip install -U transformers",
        )
    if not 0 < count < len(types) or not set(types[-count:]) <= set(types[:-count]):
        raise UsageError(
            f"config.json says that the last {count} of {len(types)} layers share keys "
            "(num_kv_shared_layers), and before them no layer of each kind has some",
            hint="correct num_kv_shared_layers or layer_types, or fetch the model again",
        )
