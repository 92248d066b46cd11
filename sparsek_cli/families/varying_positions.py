"""Rotary positions that change with the length of each text, and the one choice among them.

transformers takes `longrope`'s factors for short texts or those for long ones, and scales `dynamic`
ones, by the last position of each pass. Caches hold keys as they were turned and prompts are read
in pieces, so that one text would have keys of both. Here the model's own length decides, once for
all texts: `longrope` takes its long factors where that length is beyond the original one, and
`dynamic` positions are those of texts up to it. vLLM decides so, too, by the length it is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsek_cli.families.positions import rope_blocks, rope_type

LONGROPE, DYNAMIC = "longrope", "dynamic"
_ORIGINAL = "original_max_position_embeddings"


def varying(rope: Any) -> list[Mapping[str, Any]]:
    """The blocks of `rope_parameters` by which positions change with the length of a text."""
    return [block for block in rope_blocks({"rope_parameters": rope}) if _varies(block)]


def in_words(config: Any) -> str | None:
    """What is chosen for a model, in one line; None where there is no choice.

    Args:
        config: transformers' config object.
    """
    said = []
    for block in varying(getattr(config, "rope_parameters", None)):
        own = config.max_position_embeddings
        if rope_type(block) == DYNAMIC:
            said.append(f"as in texts up to {own:,} tokens, never scaled (dynamic)")
        elif _is_long(block, own):
            said.append(f"long factors, also in texts up to {block[_ORIGINAL]:,} tokens (longrope)")
        else:
            said.append("short factors (longrope)")
    return "; ".join(dict.fromkeys(said)) or None


def chosen(rope: Any, own: int) -> Any:
    """`rope_parameters` that say the same at any length, for programs that choose themselves.

    Args:
        own: the model's length, `max_position_embeddings`.
    """
    if not isinstance(rope, Mapping):
        return rope
    block = {key: chosen(value, own) for key, value in rope.items()}
    if not _varies(block):
        return block
    if rope_type(block) == DYNAMIC:
        return {key: block[key] for key in block if key != "factor"} | {"rope_type": "default"}
    factors = block["long_factor" if _is_long(block, own) else "short_factor"]
    return block | {"short_factor": factors, "long_factor": factors}


def _varies(block: Mapping[str, Any]) -> bool:
    # Hunyuan's `dynamic` positions have an alpha, and do not change.
    return rope_type(block) in (LONGROPE, DYNAMIC) and not block.get("alpha")


def _is_long(block: Mapping[str, Any], own: int) -> bool:
    return own > block[_ORIGINAL]
