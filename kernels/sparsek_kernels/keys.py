"""The list of keys of one call, a carried state included, and the state it leaves behind."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from sparsek_kernels.quantization import dequantize, quantize
from sparsek_kernels.state import EMPTY, SlotLayout, SparseKState

NEVER = -(1 << 30)  # the end of a key that nobody sees


@dataclasses.dataclass
class KeyList:
    """Keys in order of position: [sinks | selected | window] of the state, then new tokens.

    Key m joins the candidates at query m - base: base = -w without a state, and with one the
    number of sink and selected slots, so that the window's oldest token joins at query 0.

    Attributes:
        keys, values: [B, G, M, D], as they are attended.
        stored: the same as the state holds them, by its names: themselves, or 8-bit codes and
            scales; empty without a state.
        effective: [B, G, M] float64; +inf for sinks (gate 1), -inf for empty slots.
        positions: [B, G, M] or [B, 1, M] int64, EMPTY where there is none; None: key m is token m.
        slots: selected slots of the widest head of the state, K (0 without one).
    """

    keys: Tensor
    values: Tensor
    stored: dict[str, Tensor]
    effective: Tensor
    positions: Tensor | None
    base: int
    slots: int
    n: int


def list_keys(
    k: Tensor,
    v: Tensor,
    effective: Tensor,
    positions: Tensor,
    layout: SlotLayout,
    state: SparseKState | None,
) -> KeyList:
    """Join a state and N new tokens.

    Args:
        k, v: [B, G, N, D]. effective: [B, G, N] float64. positions: [B, N] int64.
    """
    sink = positions[:, None] < layout.sinks
    effective = effective.masked_fill(sink, torch.inf)
    where = positions[:, None]
    n = k.shape[2]
    if state is None:
        return KeyList(k, v, {}, effective, where, -layout.window, 0, n)
    held = _held(state)
    keys, values, stored = _join(state, held, k, v)
    at = state.positions.gather(1, held.flatten(1)).view(held.shape).to(torch.int64)
    widest = max(layout.topk)
    selected = slice(layout.sinks, layout.sinks + widest)
    at[:, :, selected].masked_fill_(~layout.real(k.device), EMPTY)
    e = state.scores.gather(1, held.flatten(1)).view(held.shape)
    e = e.masked_fill(at == EMPTY, -torch.inf)
    e[:, :, : layout.sinks] = torch.inf
    return KeyList(
        keys,
        values,
        stored,
        torch.cat([e, effective], 2),
        torch.cat([at, where.expand(-1, layout.heads, -1)], 2),
        layout.sinks + widest,
        widest,
        n,
    )


def _join(
    state: SparseKState, held: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Slots `held` [B, G, M'] and new tokens [B, G, N, D]: `KeyList`'s keys, values, stored."""

    def carried(x: Tensor) -> Tensor:
        index = held.flatten(1)
        if x.dim() == 3:
            index = index[..., None].expand(-1, -1, x.shape[2])
        return x.gather(1, index).unflatten(1, held.shape[1:])

    if not state.quantized:
        keys = torch.cat([carried(state.keys), k.to(state.keys.dtype)], 2)
        values = torch.cat([carried(state.values), v.to(state.values.dtype)], 2)
        return keys, values, {"keys": keys, "values": values}
    joined, stored = [], {}
    for name, codes, scale, new in (
        ("key", state.keys, state.key_scale, k),
        ("value", state.values, state.value_scale, v),
    ):
        codes, scale = carried(codes), carried(scale)
        joined.append(torch.cat([dequantize(codes, scale, new.dtype), new], 2))
        new_codes, new_scale = quantize(new.detach())
        stored[f"{name}s"] = torch.cat([codes, new_codes], 2)
        stored[f"{name}_scale"] = torch.cat([scale, new_scale], 2)
    return joined[0], joined[1], stored


def _held(state: SparseKState) -> Tensor:
    """[B, G, width] int64: slots in order of position within sinks, selected and window."""
    layout, device = state.layout, state.keys.device
    slots = layout.expand(device).expand(state.batch, -1, -1)
    split = [layout.sinks, max(layout.topk), layout.window]
    sinks, selected, window = slots.split(split, 2)
    at = state.positions.gather(1, selected.flatten(1)).view(selected.shape)
    at = at.masked_fill((at == EMPTY) | ~layout.real(device), torch.iinfo(torch.int32).max)
    selected = selected.gather(2, at.argsort(dim=2, stable=True))
    ring = (state.seen[:, None] + torch.arange(layout.window, device=device)) % layout.window
    window = window.gather(2, ring[:, None].expand_as(window))
    return torch.cat([sinks, selected, window], 2)


def candidates(keys: KeyList, layout: SlotLayout) -> Tensor:
    """[B, G, N] float64: the key that joins at each query, -inf where none does."""
    e = keys.effective.detach()
    e = e.masked_fill((e == torch.inf) | (keys.positions == EMPTY), -torch.inf)
    if keys.base >= 0:
        return e[:, :, keys.base : keys.base + keys.n]
    late = max(keys.n - layout.window, 0)
    return torch.nn.functional.pad(e[:, :, :late], (keys.n - late, 0), value=-torch.inf)


def next_state(
    keys: KeyList,
    layout: SlotLayout,
    end: Tensor,
    lengths: Tensor,
    state: SparseKState,
    tau: Tensor | None,
) -> SparseKState:
    """The state after the first `lengths` [B] new tokens of each row; tensors are new."""
    batch, heads, m = keys.effective.shape
    device = keys.effective.device
    seen = state.seen + lengths
    index = torch.arange(m, device=device)
    last = (lengths - 1)[:, None, None]
    # Joined by the last query, not gone by it, and not a sink (in its slot or among the new).
    chosen = (index - keys.base <= last) & (index >= layout.sinks) & (end > last)
    chosen &= keys.effective.detach() != torch.inf
    rank = chosen.cumsum(2).sub_(1).masked_fill_(~chosen, keys.slots)
    selected = torch.full((batch, heads, keys.slots + 1), m, device=device, dtype=torch.int64)
    selected.scatter_(2, rank, index.expand_as(rank))
    selected = selected[:, :, : keys.slots]

    sink = torch.arange(layout.sinks, device=device).expand(batch, -1)
    fresh = sink - state.seen[:, None]
    sink = torch.where(fresh < 0, sink, fresh + keys.base + layout.window)
    sink = sink.masked_fill(fresh >= lengths[:, None], m)

    slot = torch.arange(layout.window, device=device)
    newest = seen[:, None] - 1
    position = newest - (newest - slot) % layout.window
    ring = position - state.seen[:, None] + layout.window + keys.base
    ring = ring.masked_fill(position < layout.sinks, m)

    def per_head(x: Tensor) -> Tensor:
        return x[:, None].expand(-1, heads, -1)

    take = torch.cat([per_head(sink), selected, per_head(ring)], 2)
    offset = torch.arange(heads, device=device)[:, None] * m
    absent = take == m
    take = (take.masked_fill(absent, 0) + offset).flatten(1)
    take = take.index_select(1, layout.flatten(device))
    absent = absent.flatten(1).index_select(1, layout.flatten(device))

    def slots(x: Tensor, empty: float) -> Tensor:
        x = x.detach().flatten(1, 2)
        if x.dim() == 2:
            return x.gather(1, take).masked_fill(absent, empty)
        picked = x.gather(1, take[..., None].expand(-1, -1, x.shape[2]))
        return picked.masked_fill(absent[..., None], empty)

    scores = keys.effective.detach()
    scores = scores.masked_fill(scores == torch.inf, 0.0)  # a sink's score is never read
    new = SparseKState(
        layout=layout,
        **{name: slots(tensor, 0) for name, tensor in keys.stored.items()},
        positions=slots(keys.positions.expand(-1, heads, -1), EMPTY).to(torch.int32),
        scores=slots(scores, 0),
        seen=seen,
    )
    if tau is not None:
        new.support, new.tau = _support(keys, layout, lengths, state, tau)
    return new


def _support(
    keys: KeyList, layout: SlotLayout, lengths: Tensor, state: SparseKState, tau: Tensor
) -> tuple[Tensor, Tensor]:
    """Scores of the candidates above the last tau [B, G, W], sorted, -inf first; and that tau."""
    batch, heads, _ = keys.effective.shape
    before = state.tau if state.tau is not None else tau.new_full((batch, heads), -torch.inf)
    steps = torch.cat([before[..., None], tau.view(batch, heads, -1)], 2)
    last = steps.gather(2, lengths[:, None, None].expand(-1, heads, 1))
    joins = candidates(keys, layout)
    late = torch.arange(keys.n, device=tau.device) >= lengths[:, None, None]
    joins = joins.masked_fill(late, -torch.inf)
    if state.support is not None:
        joins = torch.cat([state.support, joins], 2)
    joins = joins.masked_fill(~(joins > last), -torch.inf).sort(2).values
    width = int((joins > -torch.inf).sum(2).max()) if batch else 0
    return joins[:, :, joins.shape[2] - width :].clone(), last.squeeze(2)
