"""Documents of different lengths in one call: rows without their padding, or packed ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def flatten(tensor: torch.Tensor) -> torch.Tensor:
    """[B, heads, N, ...] -> [1, heads, B * N, ...]: rows of the batch one after the other."""
    return tensor.transpose(0, 1).flatten(1, 2).unsqueeze(0)


def unflatten(tensor: torch.Tensor, batch: int) -> torch.Tensor:
    """[1, heads, B * N, D] -> [B, heads, N, D]."""
    return tensor[0].unflatten(1, (batch, -1)).transpose(0, 1)


def attend_packed(
    attend: Callable, query, key, value, scores, cu_seqlens: torch.Tensor
) -> torch.Tensor:
    """Documents packed over all rows of the batch."""
    cu_seqlens = cu_seqlens.to(device=query.device, dtype=torch.int32)
    packed = [flatten(tensor) for tensor in (query, key, value, scores)]
    return unflatten(attend(*packed, cu_seqlens), query.shape[0])


def attend_unpadded(
    attend: Callable, query, key, value, scores, mask: torch.Tensor
) -> torch.Tensor:
    """Each row is a document without its padding; outputs at padding are 0."""
    lengths = mask.sum(dim=1, dtype=torch.int32)
    cu_seqlens = nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    (tokens,) = mask.flatten().nonzero(as_tuple=True)
    packed = [flatten(tensor).index_select(2, tokens) for tensor in (query, key, value, scores)]
    flat = query.new_zeros((1, query.shape[1], mask.numel(), value.shape[-1]))
    if tokens.numel():
        flat = flat.index_copy(2, tokens, attend(*packed, cu_seqlens).to(flat.dtype))
    return unflatten(flat, query.shape[0])
