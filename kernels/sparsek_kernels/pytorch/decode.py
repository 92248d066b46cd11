"""One token for every row of a state: insert it, then attend to all slots."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from sparsek_kernels.quantization import dequantize, quantize
from sparsek_kernels.state import EMPTY, SlotLayout, SparseKState


def insert(state: SparseKState, key: Tensor, value: Tensor, effective: Tensor) -> None:
    """Put one token per row into its slot, in place.

    The token that leaves the window takes the slot of the weakest selected key if it beats it:
    (score, then the earlier token), exact against the top-k of the prefix.

    Args:
        key, value: [B, G, D]. effective: [B, G] float64.
    """
    layout, device = state.layout, state.keys.device
    rows, slots = _rows(layout, state.batch, device)
    position = state.seen[:, None]
    ring = rows[:, :, layout.width - layout.window] + position % layout.window
    positions, scores = state.positions.view(-1), state.scores.view(-1)
    if max(layout.topk):
        selected = rows[:, :, layout.sinks : layout.width - layout.window]
        at = positions[selected]
        held = scores[selected].masked_fill_(at == EMPTY, -torch.inf)
        if not layout.uniform:
            held.masked_fill_(~layout.real(device), torch.inf)
        weakest = held.amin(2, keepdim=True)
        # Of equal scores the latest loses.
        loser = at.masked_fill_(held != weakest, EMPTY - 1).argmax(2, keepdim=True)
        loser = selected.gather(2, loser).squeeze(2)
        wins = (positions[ring] != EMPTY) & (scores[ring] > weakest.squeeze(2))
        if not _asks(device) or bool(wins.any()):
            target = torch.where(wins, loser, ring).flatten()
            source = ring.flatten()
            for tensor in _per_slot(state).values():
                flat = tensor.flatten(0, 1)
                flat.index_copy_(0, target, flat.index_select(0, source))
    if layout.sinks:
        sink = rows[:, :, 0] + position.clamp(max=layout.sinks - 1)
        ring = torch.where(position < layout.sinks, sink, ring)
    new = _stored(state, key, value)
    new["positions"] = position.to(torch.int32).expand(-1, layout.heads)
    new["scores"] = effective
    for name, tensor in _per_slot(state).items():
        flat = tensor.flatten(0, 1)
        flat.index_copy_(0, ring.flatten(), new[name].flatten(0, 1).to(flat.dtype))
    state.seen += 1


def _per_slot(state: SparseKState) -> dict[str, Tensor]:
    """The state's tensors [B, S, ...] by name."""
    return {name: tensor for name, tensor in state.slots.items() if name != "seen"}


def _stored(state: SparseKState, key: Tensor, value: Tensor) -> dict[str, Tensor]:
    """New keys and values [B, G, D] as the state holds them, by its names."""
    if not state.quantized:
        return {"keys": key, "values": value}
    (keys, key_scale), (values, value_scale) = quantize(key), quantize(value)
    return {"keys": keys, "values": values, "key_scale": key_scale, "value_scale": value_scale}


def _asks(device: torch.device) -> bool:
    """Whether to ask if anything moves: elsewhere that costs more than moving it in place."""
    return device.type == "cpu"


@functools.lru_cache(maxsize=64)
def _rows(layout: SlotLayout, batch: int, device: torch.device) -> tuple[Tensor, int]:
    """[B, G, width] int64 slots in the state flattened over rows; and how many there are."""
    offset = torch.arange(batch, device=device)[:, None, None] * layout.total
    return layout.expand(device) + offset, batch * layout.total


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
    keys, values = state.keys, state.values
    if state.quantized:
        keys = dequantize(keys, state.key_scale, q.dtype)
        values = dequantize(values, state.value_scale, q.dtype)
    if layout.uniform:
        keys, values = (t.view(*shape, dim) for t in (keys, values))
        held = state.positions.view(shape) != EMPTY
    else:
        keys, values = (
            t.index_select(1, slots.flatten()).view(*shape, dim) for t in (keys, values)
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
