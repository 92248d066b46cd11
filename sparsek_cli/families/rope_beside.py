"""Rotary positions that a config.json says twice: beside the block, and otherwise within it.

Files from before the block say them beside it, and so do people who edit one by hand. Where the
block has the key, too, transformers takes that one without a word; other programs take the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsek_cli.errors import UsageError
from sparsek_cli.families.own_config import own_config
from sparsek_cli.families.positions import rope_blocks
from sparsek_cli.families.table import TABLE

# What the base is called beside a block, and in it; then the part of a head that is turned.
_SAME = {
    **dict.fromkeys(
        ("rope_theta", "rotary_emb_base", "rope_base", "rotary_base", "rope_local_base_freq"),
        "rope_theta",
    ),
    **dict.fromkeys(("partial_rotary_factor", "rotary_pct"), "partial_rotary_factor"),
}


def check_beside(config: Mapping[str, Any]) -> None:
    """What stands beside the block of rotary positions is what the block says, or one of them.

    Of families that are not in the table nobody knows what their classes write.

    Raises:
        UsageError: a value beside it that none of its blocks has.
    """
    row = TABLE.get(str(config.get("model_type")).removeprefix("sparsek_"))
    if row is None:
        return
    for name, key in _SAME.items():
        beside = config.get(name)
        within = [b[key] for b in rope_blocks(config) if b.get(key) is not None]
        if beside is None or not within or beside in within:
            continue
        # Some classes write a field of their own whatever the block says.
        if getattr(own_config(row, {"model_type": row.model_type}), name, None) == beside:
            continue
        raise UsageError(
            f"config.json says {name} {str(beside)[:40]}, and its block of rotary positions says "
            f"{key} {str(within[0])[:40]}: only that would count, in some programs the other",
            hint=f"write what the weights were trained with into the block, and take {name} out "
            "beside it",
        )
