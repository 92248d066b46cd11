"""One request's state in one layer, as a block of bytes that vLLM allocates."""

from __future__ import annotations

import torch
from sparsek_kernels import SparseKState
from sparsek_kernels.state import SlotLayout

# Rows of keys start where a GPU reads whole lines; a float64 score needs 8 as it is.
PART = 16
BLOCK = 64


def _parts(
    layout: SlotLayout, head_dim: int, dtype: torch.dtype
) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    slots = layout.total
    return [
        ("keys", (slots, head_dim), dtype),
        ("values", (slots, head_dim), dtype),
        ("scores", (slots,), torch.float64),
        ("positions", (slots,), torch.int32),
        ("seen", (), torch.int64),
    ]


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def block_bytes(layout: SlotLayout, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of one request's block: `sparsek_kernels.cache_bytes` and what alignment adds."""
    sizes = [
        torch.Size(shape).numel() * kind.itemsize
        for _, shape, kind in _parts(layout, head_dim, dtype)
    ]
    return _up(sum(_up(size, PART) for size in sizes), BLOCK)


def pool_of(
    blocks: torch.Tensor, layout: SlotLayout, head_dim: int, dtype: torch.dtype
) -> SparseKState:
    """The blocks as a pool of states; all tensors are views.

    Args:
        blocks: int8 [blocks, bytes], at least `block_bytes` of them; blocks may lie apart.
    """
    views, start = {}, 0
    for name, shape, kind in _parts(layout, head_dim, dtype):
        size = torch.Size(shape).numel() * kind.itemsize
        part = blocks[:, start : start + size].view(kind)
        views[name] = part.view(blocks.shape[0], *shape)
        start += _up(size, PART)
    return SparseKState(layout=layout, **views)
