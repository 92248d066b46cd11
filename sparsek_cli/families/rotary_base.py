"""The base of rotary positions (`rope_theta`): whether a config.json says it where it is read.

Every program that writes `rope_parameters` writes it into them. In a block that was written by hand
it is easily left out, and the class's own takes its place, which no longer scales what the weights
learnt. Files older than that block leave it out where it is the class's own, and stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsek_cli.errors import UsageError
from sparsek_cli.families.own_config import own_config
from sparsek_cli.families.positions import rope_blocks, rope_type
from sparsek_cli.families.row import Row
from sparsek_cli.families.table import TABLE

_KEY = "rope_theta"
# What files of other programs and families call it.
_NAMES = (_KEY, "rotary_emb_base", "rope_base", "rotary_base")
# Beside the blocks of Gemma 3's first files, of the layers that slide.
_OF_SLIDING = {"sliding_attention": "rope_local_base_freq"}
_AS_IT_CAME = "as the config.json that came with the weights has it"


def check_base(config: Mapping[str, Any]) -> None:
    """`rope_parameters` name their base, in the shape that the family reads.

    Raises:
        UsageError: the class's own base would take the place of the model's, without a word.
    """
    row = TABLE.get(str(config.get("model_type")).removeprefix("sparsek_"))
    within = config.get("rope_parameters")
    if isinstance(within, Mapping) and within:
        _check_blocks(config, within, row)
    elif row is not None:
        _check_beside(config, row)


def _check_blocks(config: Mapping[str, Any], within: Mapping[str, Any], row: Row | None) -> None:
    nested = {name: block for name, block in within.items() if isinstance(block, Mapping)}
    if row is not None and row.rope_by_type:
        flat = not nested and any(value is not None for value in within.values())
        if flat or rope_type(within) != "default":
            raise UsageError(
                f"config.json: rope_parameters hold one block, and {row.model_type} reads one for "
                "each type of layer: none would heed it",
                hint=f"write a block for each type into it, {_AS_IT_CAME}: "
                '"full_attention": {...}, "sliding_attention": {...}',
            )
    elif row is not None and nested:
        raise UsageError(
            f"config.json: rope_parameters hold a block for {next(iter(nested))}, and "
            f"{row.model_type} reads one block for all layers: none would heed it",
            hint=f"write its keys into rope_parameters themselves, {_AS_IT_CAME}",
        )
    for name, block in (nested or {"": within}).items():
        if row is not None and row.rope_by_type and not nested:
            break  # null stands for the class's own
        if block.get(_KEY) is None and (_KEY in block or not _said_beside(config, name, row)):
            at = f".{name}" if name else ""
            known = None if row is None else _of_class(config, name, row)
            if row is not None and known is None:
                raise UsageError(
                    f"config.json has rope_parameters{at} ({rope_type(block)}), and "
                    f"{row.model_type} has no rotary positions: nothing would heed them",
                    hint="take rope_parameters out",
                )
            unsaid = "" if row is None else f"; where it names none, {known}"
            raise UsageError(
                f"config.json: rope_parameters{at} ({rope_type(block)}) name no {_KEY}, and that "
                "of the class would count, whatever the weights were trained with",
                hint=f'write "{_KEY}": NUMBER into it, {_AS_IT_CAME}, there or beside it{unsaid}',
            )


def _of_class(config: Mapping[str, Any], name: str, row: Row) -> Any:
    """The base that old files without a block mean; None: there are no rotary positions."""
    old = {key: value for key, value in config.items() if not key.startswith("rope_")}
    rope = own_config(row, old | {"model_type": row.model_type}).to_dict().get("rope_parameters")
    block = rope if isinstance(rope, Mapping) else {}
    return (block.get(name) or block).get(_KEY)


def _said_beside(config: Mapping[str, Any], name: str, row: Row | None) -> bool:
    """Whether a key outside of a block says its base."""
    if row is None:
        return any(config.get(key) is not None for key in _NAMES)
    scaling = config.get("rope_scaling")
    if isinstance(scaling, Mapping) and scaling.get(_KEY) is not None and not row.rope_by_type:
        return True  # that block is read in place of this one
    return config.get(_OF_SLIDING.get(name) or row.key(_KEY)) is not None


def _check_beside(config: Mapping[str, Any], row: Row) -> None:
    """Without a block: a base under a name that the family does not read, or null."""
    own = row.key(_KEY)
    other = next((key for key in _NAMES if key != own and config.get(key) is not None), None)
    unsaid = own in config and config[own] is None
    if not unsaid and (other is None or config.get(own) is not None):
        return
    blocks = rope_blocks(own_config(row, config).to_dict())
    if unsaid and any(block.get(_KEY) is None for block in blocks):
        raise UsageError(
            f"config.json: {own} is null, and rotary positions need a number",
            hint=f"write the number, {_AS_IT_CAME}; where that one has no {own}, take it out",
        )
    if other is None or all(block.get(_KEY) == config[other] for block in blocks):
        return  # has no rotary positions, or means the same
    raise UsageError(
        f"config.json names the base of rotary positions {other}, which {row.model_type} does not "
        f"read: it would be {blocks[0].get(_KEY)}, not {config[other]}",
        hint=f"write it as {own}",
    )
