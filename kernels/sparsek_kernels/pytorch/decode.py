"""One token for every row of a state: insert it, then attend to all slots."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsek_kernels.state import EMPTY, SparseKState


def insert(state: SparseKState, key: Tensor, value: Tensor, effective: Tensor) -> None:
    """Put one token per row into its slot, in place.

    The token that leaves the window takes the slot of the weakest selected key if it beats it:
    (score, then the earlier token), exact against the top-k of the prefix.

    Args:
        key, value: [B, G, D]. effective: [B, G] float64.
    """
    layout, device = state.layout, state.keys.device
    slots = layout.expand(device)
    sinks, window = layout.sinks, layout.window
    ring_at = layout.width - window
    position = state.seen[:, None]
    row = torch.arange(state.batch, device=device)[:, None]
    ring = slots[:, ring_at][None] + position % window
    if max(layout.topk):
        selected = slots[:, sinks:ring_at]
        held = state.scores[:, selected]
        at = state.positions[:, selected]
        held = held.masked_fill(at == EMPTY, -torch.inf)
        if not layout.uniform:
            held = held.masked_fill(~layout.real(device), torch.inf)
        weakest = held.amin(2, keepdim=True)
        # Of equal scores the latest loses.
        loser = at.masked_fill(held != weakest, EMPTY - 1).argmax(2)
        loser = selected.expand(state.batch, -1, -1).gather(2, loser[..., None]).squeeze(2)
        leaving = state.scores[row, ring]
        wins = (state.positions[row, ring] != EMPTY) & (leaving > weakest.squeeze(2))
        target = torch.where(wins, loser, ring)
        for tensor in (state.keys, state.values, state.positions, state.scores):
            tensor[row, target] = tensor[row, ring]
    if sinks:
        sink = slots[:, 0][None] + position.clamp(max=sinks - 1)
        ring = torch.where(position < sinks, sink, ring)
    state.keys[row, ring] = key.to(state.keys.dtype)
    state.values[row, ring] = value.to(state.values.dtype)
    state.positions[row, ring] = position.to(torch.int32).expand_as(ring)
    state.scores[row, ring] = effective
    state.seen += 1


def decode(q: Tensor, state: SparseKState, *, scale: float) -> Tensor:
    """Attention of one query per row to every slot that holds a token (gate straight_through).

    Args:
        q: [B, H, 1, D].

    Returns:
        [B, H, 1, D] in q's dtype.
    """
    batch, heads, _, dim = q.shape
    layout = state.layout
    slots = layout.expand(q.device)
    shape = (batch, layout.heads, layout.width)
    if layout.uniform:
        keys, values = (t.view(*shape, dim) for t in (state.keys, state.values))
        held = state.positions.view(shape) != EMPTY
    else:
        keys, values = (
            t.index_select(1, slots.flatten()).view(*shape, dim) for t in (state.keys, state.values)
        )
        held = state.positions[:, slots] != EMPTY
        selected = slice(layout.sinks, layout.width - layout.window)
        held[:, :, selected] &= layout.real(q.device)
    # The group's heads are the queries of one small attention per KV head.
    grouped = q.reshape(batch, layout.heads, heads // layout.heads, dim).to(keys.dtype)
    out = torch.nn.functional.scaled_dot_product_attention(
        grouped, keys, values, attn_mask=held[:, :, None], scale=scale
    )
    return out.reshape(batch, heads, 1, dim).to(q.dtype)
