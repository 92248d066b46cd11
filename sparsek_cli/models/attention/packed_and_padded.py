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


Attend = Callable[..., torch.Tensor]


def attend_packed(
    attend: Attend,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scores: torch.Tensor,
    cu_seqlens: torch.Tensor,
) -> torch.Tensor:
    """Documents packed over all rows of the batch.

    Args:
        attend: from query, key, value, scores of one row and bounds int32 [documents + 1] to its
            output [1, H, tokens, D].
        query: [B, H, N, D]. key, value: [B, G, N, D]. scores: [B, G, N].
        cu_seqlens: [documents + 1], bounds of the documents in B * N tokens.

    Returns:
        [B, H, N, D] in the output's dtype.
    """
    cu_seqlens = cu_seqlens.to(device=query.device, dtype=torch.int32)
    packed = [flatten(tensor) for tensor in (query, key, value, scores)]
    return unflatten(attend(*packed, cu_seqlens), query.shape[0])


def attend_unpadded(
    attend: Attend,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scores: torch.Tensor,
    mask: torch.Tensor,
) -> torch.Tensor:
    """Each row is a document without its padding; outputs at padding are 0.

    Args:
        attend, query, key, value, scores: as in `attend_packed`.
        mask: bool [B, N], True where a token stands.

    Returns:
        [B, H, N, D] in the query's dtype.
    """
    lengths = mask.sum(dim=1, dtype=torch.int32)
    cu_seqlens = nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    (tokens,) = mask.flatten().nonzero(as_tuple=True)
    packed = [flatten(tensor).index_select(2, tokens) for tensor in (query, key, value, scores)]
    flat = query.new_zeros((1, query.shape[1], mask.numel(), value.shape[-1]))
    if tokens.numel():
        flat = flat.index_copy(2, tokens, attend(*packed, cu_seqlens).to(flat.dtype))
    return unflatten(flat, query.shape[0])


def counted_positions(
    hidden_states: torch.Tensor,
    mask: torch.Tensor | None,
    bounds: torch.Tensor | None,
    seen: torch.Tensor | None,
) -> torch.Tensor:
    """Positions, int64 [B or 1, N], of a pass in families that hand attention none.

    Args:
        hidden_states: [B, N, hidden_size].
        mask: bool [B, N], False at padding, which has some position; None without padding.
        bounds: int32 [documents + 1] of packed documents; None where each row is one.
        seen: int64 [B], tokens of each row that were read before; None: none.
    """
    batch, count = hidden_states.shape[:2]
    device = hidden_states.device
    if bounds is not None:
        places, bounds = torch.arange(batch * count, device=device), bounds.to(device)
        document = torch.searchsorted(bounds, places, right=True) - 1
        return (places - bounds[document]).view(batch, count)
    places = torch.arange(count, device=device)[None]
    if mask is not None:
        places = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return places if seen is None else places + seen[:, None]
