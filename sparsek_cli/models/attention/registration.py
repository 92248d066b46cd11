"""The names under which transformers finds the attention functions and their masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparsek_cli.models.attention.dense import dense_attention_forward, dense_mask
from sparsek_cli.models.attention.sparsek import sparsek_attention_forward, sparsek_padding_mask
from sparsek_cli.models.config import ATTENTION, DENSE_ATTENTION


def register_attention() -> None:
    """Make both attention functions known to transformers by name."""
    AttentionInterface.register(ATTENTION, sparsek_attention_forward)
    AttentionMaskInterface.register(ATTENTION, sparsek_padding_mask)
    AttentionInterface.register(DENSE_ATTENTION, dense_attention_forward)
    AttentionMaskInterface.register(DENSE_ATTENTION, dense_mask)


@contextmanager
def replaced_attention(name: str, make: Callable[[Callable], Callable]) -> Iterator[None]:
    """Within the block transformers calls `make(what it called before)` under this name.

    Registered, not assigned: an item assigned to transformers' mapping would hide every later
    registration.
    """
    before = ALL_ATTENTION_FUNCTIONS[name]
    AttentionInterface.register(name, make(before))
    try:
        yield
    finally:
        AttentionInterface.register(name, before)
