"""The sizes of a model, read from config.json alone.

Importing transformers' modelling code takes longer than a whole conversion, so planning and
writing read names and sizes themselves, by the family's row; what a file leaves out is asked of
the family's config class. Tests hold both equal to the real model classes.
"""

from dataclasses import dataclass
from typing import Any

from sparsek_cli.errors import UsageError
from sparsek_cli.families import Row
from sparsek_cli.families.by_layer import pair_features, shared_layers, sizes_by_layer
from sparsek_cli.families.own_config import own_config, own_value
from sparsek_cli.families.positions import (
    check_rotary,
    context_length,
    rope_blocks,
    rope_of,
    rope_type,
)
from sparsek_cli.families.varying_positions import DYNAMIC, LONGROPE, in_words

_OPTIONAL = ("num_hidden_layers", "num_key_value_heads", "head_dim", "max_position_embeddings")
_CONTEXT = 2048
_VARYING = {LONGROPE, DYNAMIC, "su"}  # the last as Phi-3's first files call longrope


@dataclass(frozen=True)
class Geometry:
    """The sizes that decide scorers and cache: all counts, head_dim in features.

    Attributes:
        kv_heads, head_dim: of the layers that are converted.
        sliding_features: of the keys that a token has in all layers that slide; None: as many in
            each of them as in the others.
        values_are_keys: layers that are converted have no projection of values.
        shared: how many of the last layers have no keys of their own.
        positions: what is chosen where positions change with a text's length; None: they do not.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    dtype: str
    sliding_features: int | None = None
    values_are_keys: bool = False
    shared: int = 0
    positions: str | None = None


def geometry(config: dict[str, Any], row: Row) -> Geometry:
    """Sizes from a config.json dictionary.

    Raises:
        UsageError: a size is missing or is not a positive whole number, or rotary positions turn
            an odd number of features.
    """

    alone: dict[str, Any] = {}
    if row.by_layer:
        own = own_config(row, config)
        config, alone = {**config, **sizes_by_layer(own)}, _apart(own)
    left_out = [name for name in _OPTIONAL if config.get(row.key(name)) is None]
    if left_out and not row.plain_sizes:
        own = own_config(row, config)
        found = {name: getattr(own, row.key(name), None) for name in left_out}
        config = {**config, **{row.key(n): v for n, v in found.items() if v is not None}}

    def size(name: str, default: int | None = None) -> int:
        key = row.key(name)
        value = config.get(key)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise UsageError(
                f"config.json: {key} is {value!r}, expected a positive whole number",
                hint="the checkpoint's config.json is incomplete; download it again",
            )
        return value

    heads = size("num_attention_heads")
    hidden = size("hidden_size")
    width = size("head_dim", hidden // heads)
    check_rotary(_with_rotary_part(config, row, width), width)
    scaled = {rope_type(block) for block in rope_blocks(config)}
    return Geometry(
        layers=size("num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=size("num_key_value_heads", heads),
        head_dim=width,
        context=context_length(
            size("max_position_embeddings", _CONTEXT),
            rope_of(config),
        ),
        dtype=config.get("dtype") or config.get("torch_dtype") or "float32",
        positions=in_words(own_config(row, config)) if scaled & _VARYING else None,
        **alone,
    )


def _apart(own: Any) -> dict[str, Any]:
    """What `Geometry` says beyond other families of one whose layers differ."""
    shared = shared_layers(own)
    types = own.layer_types[: len(own.layer_types) - shared]
    slide = [n for n, kind in enumerate(types) if kind == "sliding_attention"]
    return {
        "sliding_features": sum(pair_features(own, layer) for layer in slide),
        "values_are_keys": bool(own_value(own, "attention_k_eq_v")),
        "shared": shared,
    }


def _with_rotary_part(config: dict[str, Any], row: Row, head_dim: int) -> dict[str, Any]:
    """The config with the share of a head that is rotated, which files may leave to the class.

    The classes' own shares are quarters, halves and wholes: of widths that eight divides all of
    them are even, and nobody is asked but where each pair has a factor of its own.
    """
    longrope = any(rope_type(block) == "longrope" for block in rope_blocks(config))
    if head_dim % 8 == 0 and not longrope:
        return config
    own = own_config(row, config).to_dict()
    turned = own.get("rope_parameters") or config.get("rope_parameters")
    return {**own, **config, "rope_parameters": turned}
