"""The longest text that a model's positions were made for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


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


def _stretched(own: int, block: Mapping[str, Any]) -> int:
    if rope_type(block) != "yarn":
        return own
    original = block.get("original_max_position_embeddings") or own
    factor = block.get("factor") or 1.0
    numbers = all(isinstance(number, int | float) for number in (original, factor))
    return int(original * factor) if numbers else own
