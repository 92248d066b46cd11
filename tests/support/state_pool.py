"""A pool of states as a server keeps it: all of a row's tensors in one block of bytes."""

from __future__ import annotations

import torch
from sparsek_kernels import SparseKState


def strided_pool(rows: int, heads: int, dim: int, *, dtype=torch.float32, device="cpu", **settings):
    """A pool whose rows are wider than what they hold, full of what an earlier owner left."""
    like = SparseKState.empty(rows, heads, dim, dtype=dtype, device=device, **settings)
    names = sorted(like.slots, key=lambda name: -like.slots[name].itemsize)
    sizes = [getattr(like, name)[0].nbytes for name in names]
    sizes[-1] += -sum(sizes) % 8 + 24
    blocks = torch.zeros(rows, sum(sizes), dtype=torch.uint8, device=device)
    start = 0
    for name, size in zip(names, sizes, strict=True):
        tensor = getattr(like, name)
        part = blocks[:, start : start + tensor[0].nbytes].view(tensor.dtype)
        setattr(like, name, part.view(tensor.shape))
        start += size
    for tensor in like.slots.values():
        tensor.fill_(torch.nan if tensor.is_floating_point() else 7)
    return like
