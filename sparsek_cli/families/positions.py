"""Rotary positions: the longest text they were made for, and the part of a head that they turn."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sparsek_cli.errors import UsageError

_PARTS = ("partial_rotary_factor", "rotary_pct")
_SCALED = ("linear", "dynamic", "yarn", "longrope", "llama3")
# Of such a block; what is left out, or null, transformers fills in or misses by name.
_POSITIVE = (
    "factor", "rope_theta", "original_max_position_embeddings", "attention_factor",
    "beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor",
)  # fmt: skip


def context_length(own: int, rope: Any) -> int:
    """`max_position_embeddings`, or what YaRN makes of it.

    Model cards switch YaRN on by its block alone and leave `max_position_embeddings` at the length
    that the model was trained on; other configs name the stretched length there.

    Args:
        own: `max_position_embeddings`.
        rope: the config's `rope_parameters` or `rope_scaling`: one block, or one for each type of
            layer.
    """
    if not isinstance(rope, Mapping):
        return own
    blocks = [rope, *(block for block in rope.values() if isinstance(block, Mapping))]
    return max(own, *(_stretched(own, block) for block in blocks))


def rope_type(rope: Any) -> str | None:
    """How rotary positions are scaled ("default": not at all); None without such positions."""
    if not isinstance(rope, Mapping):
        return None
    return rope.get("rope_type") or rope.get("type") or "default"


def check_rotary(config: Mapping[str, Any], head_dim: int) -> None:
    """Rotary positions turn features in pairs.

    Of an odd number of features some families make one more, whose queries and keys are then wider
    than their values; others do not run at all, or leave half a pair behind.

    Args:
        config: a config as a dictionary; what it leaves out is taken for even.
        head_dim: features of a head.

    Raises:
        UsageError: the part of a head that is turned is an odd number of features; or positions
            are scaled by what transformers only warns of, and computes nonsense with.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    blocks = [config, rope, *rope.values()] if isinstance(rope, Mapping) else [config]
    widths = [config.get("rotary_dim")]
    for block in blocks:
        if isinstance(block, Mapping) and rope_type(block) != "proportional":
            widths += [_part(head_dim, block.get(key)) for key in _PARTS]
    if config.get("rope_parameters"):
        widths.append(next((width for width in widths if width is not None), head_dim))
    turned = next((width for width in widths if isinstance(width, int)), head_dim)
    for block in blocks[1:]:
        if rope_type(block) in _SCALED:
            _check_scaling(block, turned)
    odd = next((width for width in widths if isinstance(width, int) and width % 2), None)
    if odd is not None:
        raise UsageError(
            f"config.json: rotary positions turn {odd} of the {head_dim} features of a head, and "
            "an odd number makes no pairs",
            hint="correct partial_rotary_factor (rotary_pct, rotary_dim) or head_dim: the weights "
            "were not made with these",
        )


def _check_scaling(block: Mapping[str, Any], turned: int) -> None:
    """Raises UsageError for numbers that scale no positions.

    Args:
        turned: features of a head; each pair of them has a factor of its own in longrope.
    """
    kind = rope_type(block)
    for key in _POSITIVE:
        value = block.get(key)
        numeric = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (numeric and 0 < value < math.inf):
            raise _wrong_scaling(kind, f"{key} {value!r}", "it is a number above 0")
    for key in ("short_factor", "long_factor"):
        each = block.get(key)
        if kind == "longrope" and isinstance(each, list | tuple) and len(each) != turned // 2:
            raise _wrong_scaling(kind, f"{len(each)} numbers in {key}", f"it takes {turned // 2}")
    ends = {
        "yarn": ("beta_slow", block.get("beta_slow") or 1,
                 "beta_fast", block.get("beta_fast") or 32),
        "llama3": ("low_freq_factor", block.get("low_freq_factor"),
                   "high_freq_factor", block.get("high_freq_factor")),
    }.get(kind)  # fmt: skip
    if ends is None or None in ends:
        return
    low, least, high, most = ends
    if least > most or (least == most and kind == "llama3"):
        raise _wrong_scaling(kind, f"{low} {least} and {high} {most}", f"{low} is the smaller one")


def _wrong_scaling(kind: str | None, what: str, rule: str) -> UsageError:
    return UsageError(
        f"config.json scales rotary positions ({kind}) with {what}, and {rule}",
        hint="correct it in rope_parameters (rope_scaling): the weights were made with another",
    )


def _part(head_dim: int, factor: Any) -> int | None:
    """Features that a share of a head has; None where it is no share."""
    numeric = isinstance(factor, int | float) and not isinstance(factor, bool)
    return int(head_dim * factor) if numeric and 0 < factor <= 1 else None


def _stretched(own: int, block: Mapping[str, Any]) -> int:
    if rope_type(block) != "yarn":
        return own
    original = block.get("original_max_position_embeddings") or own
    factor = block.get("factor") or 1.0
    numbers = all(isinstance(number, int | float) for number in (original, factor))
    return int(original * factor) if numbers else own
