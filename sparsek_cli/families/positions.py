"""Rotary positions: the longest text they were made for, and the part of a head that they turn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsek_cli.errors import UsageError

_PARTS = ("partial_rotary_factor", "rotary_pct")


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
        UsageError: the part of a head that is turned is an odd number of features.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    blocks = [config, rope, *rope.values()] if isinstance(rope, Mapping) else [config]
    widths = [config.get("rotary_dim")]
    for block in blocks:
        if isinstance(block, Mapping) and rope_type(block) != "proportional":
            widths += [_part(head_dim, block.get(key)) for key in _PARTS]
    if config.get("rope_parameters"):
        widths.append(next((width for width in widths if width is not None), head_dim))
    odd = next((width for width in widths if isinstance(width, int) and width % 2), None)
    if odd is not None:
        raise UsageError(
            f"config.json: rotary positions turn {odd} of the {head_dim} features of a head, and "
            "an odd number makes no pairs",
            hint="correct partial_rotary_factor (rotary_pct, rotary_dim) or head_dim: the weights "
            "were not made with these",
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
