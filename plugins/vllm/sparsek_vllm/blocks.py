"""One request's state in one layer, as a block of bytes that vLLM allocates."""

from __future__ import annotations

import torch
from sparsek_kernels import SparseKState
from sparsek_kernels.state import SlotLayout

# Rows of keys start where a GPU reads whole lines; a float64 score needs 8 as it is.
PART = 16
BLOCK = 64


def _like(layout: SlotLayout, head_dim: int, dtype: torch.dtype) -> SparseKState:
    """A state of one row without memory, which says what a block must hold."""
    shape = {"topk": layout.topk, "window": layout.window, "sinks": layout.sinks}
    return SparseKState.empty(1, layout.heads, head_dim, dtype=dtype, device="meta", **shape)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def block_bytes(layout: SlotLayout, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of one request's block: `sparsek_kernels.cache_bytes` and what alignment adds."""
    held = _like(layout, head_dim, dtype).slots.values()
    return _up(sum(_up(tensor.nbytes, PART) for tensor in held), BLOCK)


def pool_of(
    blocks: torch.Tensor, layout: SlotLayout, head_dim: int, dtype: torch.dtype
) -> SparseKState:
    """The blocks as a pool of states; all tensors are views.

    Args:
        blocks: int8 [blocks, bytes], at least `block_bytes` of them; blocks may lie apart.
        dtype: of the keys and values, or int8 for the 8-bit cache.
    """
    pool, start = _like(layout, head_dim, dtype), 0
    for name, tensor in pool.slots.items():
        part = blocks[:, start : start + tensor.nbytes].view(tensor.dtype)
        setattr(pool, name, part.view(blocks.shape[0], *tensor.shape[1:]))
        start += _up(tensor.nbytes, PART)
    return pool
