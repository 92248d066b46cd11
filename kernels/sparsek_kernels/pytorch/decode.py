"""One token for every row of a state: insert it, then attend to all slots."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from sparsek_kernels.pytorch.stand_ins import by_head, log_missing
from sparsek_kernels.quantization import dequantize, quantize
from sparsek_kernels.state import EMPTY, SparseKState, StateRows


def insert(state: SparseKState | StateRows, key: Tensor, value: Tensor, effective: Tensor) -> None:
    """Put one token per row into its slot, in place.

    The token that leaves the window takes the slot of the weakest selected key if it beats it:
    (score, then the earlier token), exact against the top-k of the prefix.

    Args:
        key, value: [B, G, D]. effective: [B, G] float64.
    """
    pool, rows = _pool(state)
    pool.support = pool.tau = None
    layout, device = pool.layout, key.device
    slots = layout.expand(device)
    position = pool.seen[rows]
    ring = slots[:, layout.width - layout.window] + position % layout.window  # [B, G]
    if max(layout.topk):
        selected = slots[:, layout.sinks : layout.width - layout.window]
        at = pool.positions[rows[:, :, None], selected]
        held = pool.scores[rows[:, :, None], selected].masked_fill_(at == EMPTY, -torch.inf)
        if not layout.uniform:
            held.masked_fill_(~layout.real(device), torch.inf)
        weakest = held.amin(2, keepdim=True)
        # Of equal scores the latest loses.
        loser = at.masked_fill_(held != weakest, EMPTY - 1).argmax(2, keepdim=True)
        loser = selected.expand_as(at).gather(2, loser).squeeze(2)
        wins = pool.positions[rows, ring] != EMPTY
        wins &= pool.scores[rows, ring] > weakest.squeeze(2)
        if not _asks(device) or bool(wins.any()):
            target = torch.where(wins, loser, ring)
            for tensor in _per_slot(pool).values():
                tensor[rows, target] = tensor[rows, ring]
    if layout.sinks:
        sink = slots[:, 0] + position.clamp(max=layout.sinks - 1)
        ring = torch.where(position < layout.sinks, sink, ring)
    new = _stored(pool, key, value)
    new["positions"] = position.expand_as(ring)
    new["scores"] = effective
    for name, tensor in _per_slot(pool).items():
        tensor[rows, ring] = new[name].to(tensor.dtype)
    pool.seen[rows] = position + 1


def _pool(state: SparseKState | StateRows) -> tuple[SparseKState, Tensor]:
    """The tensors that hold the rows, and [B, 1] int64 which rows of them."""
    if isinstance(state, StateRows):
        return state.pool, state.rows[:, None]
    return state, torch.arange(state.batch, device=state.keys.device)[:, None]


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


def decode(
    q: Tensor,
    state: SparseKState | StateRows,
    *,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    stand_ins: Tensor | None = None,
) -> Tensor:
    """Attention of one query per row to every slot that holds a token (gate straight_through).

    Its own token is in the state.

    Args:
        q: [B, H, 1, D]. softcap, sink_logits [H], stand_ins [H, M, 2 D + 2]: as in
            sparsek_attention.

    Returns:
        [B, H, 1, D] in q's dtype.
    """
    layout = state.layout
    options = dict(softcap=softcap, sink_logits=sink_logits, stand_ins=stand_ins)
    if isinstance(state, StateRows) and q.device.type == "cpu":
        # Views of the rows, one after the other: gathering them would copy all their slots.
        parts = [
            decode(one, _row(state.pool, row), scale=scale, **options)
            for one, row in zip(q.split(1), state.rows.tolist(), strict=True)
        ]
        return torch.cat(parts)
    batch, heads, _, dim = q.shape
    slots = layout.expand(q.device)
    keys, values = _padded(state, "key", slots, q.dtype), _padded(state, "value", slots, q.dtype)
    held = _gather(_pool(state)[0].positions, state, slots) != EMPTY
    if not layout.uniform:
        held[:, :, layout.sinks : layout.width - layout.window] &= layout.real(q.device)
    # The group's heads are the queries of one small attention per KV head.
    grouped = q.reshape(batch, layout.heads, heads // layout.heads, dim).to(keys.dtype)
    if all(option is None for option in options.values()):
        out = torch.nn.functional.scaled_dot_product_attention(
            grouped, keys, values, attn_mask=held[:, :, None], scale=scale
        )
    else:
        places = state.seen[:, None] - 1
        with torch.autocast(q.device.type, enabled=False):
            out = _attend(grouped, keys, values, held, scale, layout, places, **options)
    return out.reshape(batch, heads, 1, dim).to(q.dtype)


def _attend(
    q, keys, values, held, scale: float, layout, places, *, softcap, sink_logits, stand_ins
) -> Tensor:
    """Of q [B, G, rep, D] over the slots `held` [B, G, width]: [B, G, rep, D] in fp32 or fp64.

    `places` [B, 1] are those of the queries.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    logits = (q.to(dtype) * scale) @ keys.to(dtype).transpose(2, 3)
    if softcap is not None:
        logits = logits.div(softcap).tanh_() * softcap
    logits = logits.masked_fill_(~held[:, :, None], -torch.inf)
    if sink_logits is not None:
        nothing = sink_logits.to(dtype).view(1, *q.shape[1:3], 1).expand(q.shape[0], -1, -1, -1)
        logits = torch.cat([logits, nothing], 3)
    if stand_ins is None:
        return logits.softmax(3)[..., : keys.shape[2]] @ values.to(dtype)
    their_keys, their_values, *beside = by_head(stand_ins, layout.heads, dtype)
    biases, limits = (x.squeeze(3) for x in beside)
    # [B, G, rep, M]: every query head has its own.
    theirs = (q.to(dtype)[..., None, :] * their_keys).sum(4) * scale
    theirs = theirs + biases + log_missing(places, layout, dtype)[..., None].minimum(limits)
    weights = torch.cat([logits, theirs], 3).softmax(3)
    own = (weights[..., -theirs.shape[3] :, None] * their_values).sum(3)
    return weights[..., : keys.shape[2]] @ values.to(dtype) + own


def _row(pool: SparseKState, row: int) -> SparseKState:
    """One row of a pool as a state; its tensors are views."""
    return dataclasses.replace(pool, **{n: t[row : row + 1] for n, t in pool.slots.items()})


def _padded(
    state: SparseKState | StateRows, part: str, slots: Tensor, dtype: torch.dtype
) -> Tensor:
    """Keys or values [B, G, width, D] in the padded form, as numbers."""
    pool, _ = _pool(state)
    rows = _gather(getattr(pool, f"{part}s"), state, slots)
    if not pool.quantized:
        return rows
    return dequantize(rows, _gather(getattr(pool, f"{part}_scale"), state, slots), dtype)


def _gather(tensor: Tensor, state: SparseKState | StateRows, slots: Tensor) -> Tensor:
    """[B, G, width, ...] in the padded form, of a tensor [rows, S, ...]; a view where it can be."""
    if isinstance(state, StateRows):
        return tensor[state.rows[:, None, None], slots]
    if state.layout.uniform:
        return tensor.unflatten(1, slots.shape)
    return tensor.index_select(1, slots.flatten()).unflatten(1, slots.shape)
