"""The length that scaled rotary positions start from: whether it stands where the class reads it.

Phi-3 reads it beside the block that scales, every other family within, and where it is not found
another length takes its place. Under `su`, longrope's first name, transformers finds none at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsek_cli.errors import UsageError
from sparsek_cli.families.positions import rope_blocks, rope_type

_KEY = "original_max_position_embeddings"
_BESIDE, _OF_ITS_CLASS = ("phi3",), 4096
_SCALED = ("yarn", "longrope", "llama3")


def check_original(config: Mapping[str, Any]) -> None:
    """Looks at each block that scales rotary positions.

    Raises:
        UsageError: its original length would be another than the file says, or none.
    """
    kind = str(config.get("model_type")).removeprefix("sparsek_")
    beside, own = config.get(_KEY), config.get("max_position_embeddings")
    for block in rope_blocks(config):
        within, scaled = block.get(_KEY), rope_type(block)
        if scaled == "su" and within is None:
            _refuse_old_name(beside)
        if scaled not in _SCALED:
            continue
        if kind in _BESIDE and within not in (None, _OF_ITS_CLASS if beside is None else beside):
            taken = _OF_ITS_CLASS if beside is None else beside
            raise UsageError(
                f"config.json: {_KEY} is {within} within the block that scales rotary positions "
                f"({scaled}), and {kind} reads it beside: it would be {taken}",
                hint=f'write "{_KEY}": {within} outside of the block',
            )
        if kind not in _BESIDE and within is None and beside not in (None, own):
            raise UsageError(
                f"config.json: {_KEY} is {beside} beside the block that scales rotary positions "
                f"({scaled}), and {kind} reads it within: it would be {own}",
                hint=f'write "{_KEY}": {beside} into the block',
            )


def _refuse_old_name(beside: Any) -> None:
    length = f', and "{_KEY}": NUMBER outside of the block ({_OF_ITS_CLASS} for the first Phi-3)'
    raise UsageError(
        'config.json scales rotary positions by "su", as longrope was called first, and '
        "transformers finds no original length under that name",
        hint=f'write "longrope" in place of "su"{"" if beside is not None else length}',
    )
