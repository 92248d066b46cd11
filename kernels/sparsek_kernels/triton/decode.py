"""One token for every row of a state: insertion into the slots, attention over them.

All shapes are those of the state, whatever the context: both steps can be captured in a CUDA graph.
Insertion keeps exactly the set that prefix selection keeps: the token that leaves the window takes
the slot of the worst selected key if its score is larger; of equal scores the latest token is the
worst, so a leaving token, later than all of them, needs a strictly larger one.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from sparsek_kernels.state import EMPTY, SlotLayout, SparseKState
from sparsek_kernels.triton.forward import LOG2_E, dot_precision, load_rows

_EMPTY = tl.constexpr(EMPTY)
_LOW = tl.constexpr(-1.0e30)
SPLIT = 256  # slots attended by one program


@triton.jit
def _insert(
    keys, values, positions, scores, seen, heads_table,
    new_key, new_value, new_score,
    nk_b, nk_h, nv_b, nv_h, slots, heads, sinks, window,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Puts the token of one row into the slots of one head."""
    batch = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    first = tl.load(heads_table + 2 * head)
    k = tl.load(heads_table + 2 * head + 1)
    token = tl.load(seen + batch)
    base = batch * slots + first
    ring = base + sinks + k + token % window
    leaving_position = tl.load(positions + ring)
    leaving_score = tl.load(scores + ring)
    d = tl.arange(0, DP)
    mask = d < D
    # The worst selected slot; an empty one is worse than any key.
    worst = tl.full([], float("inf"), tl.float64)
    latest = -1
    loser = base
    for start in range(0, k, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        inside = slot < k
        at = base + sinks + slot
        position = tl.load(positions + at, mask=inside, other=0)
        score = tl.load(scores + at, mask=inside, other=float("inf"))
        score = tl.where(inside & (position == _EMPTY), -float("inf"), score)
        low = tl.min(score, 0)
        rival = tl.where(inside & (score == low), position, _EMPTY - 1)
        last = tl.max(rival, 0)
        place = tl.max(tl.where(rival == last, slot, 0), 0)
        better = (low < worst) | ((low == worst) & (last > latest))
        loser = tl.where(better, base + sinks + place, loser)
        latest = tl.where(better, last, latest)
        worst = tl.where(better, low, worst)
    moves = (k > 0) & (leaving_position != _EMPTY) & (leaving_score > worst)
    row = tl.load(keys + ring * D + d, mask=mask & moves, other=0.0)
    tl.store(keys + loser * D + d, row, mask=mask & moves)
    row = tl.load(values + ring * D + d, mask=mask & moves, other=0.0)
    tl.store(values + loser * D + d, row, mask=mask & moves)
    tl.store(positions + loser, leaving_position, mask=moves)
    tl.store(scores + loser, leaving_score, mask=moves)
    tl.debug_barrier()  # the ring row was read by all threads before it is overwritten
    target = tl.where(token < sinks, base + token, ring)
    row = tl.load(new_key + batch * nk_b + head * nk_h + d, mask=mask, other=0.0)
    tl.store(keys + target * D + d, row.to(keys.dtype.element_ty), mask=mask)
    row = tl.load(new_value + batch * nv_b + head * nv_h + d, mask=mask, other=0.0)
    tl.store(values + target * D + d, row.to(values.dtype.element_ty), mask=mask)
    tl.store(positions + target, token.to(tl.int32))
    tl.store(scores + target, tl.load(new_score + batch * heads + head))


@triton.jit
def _attend_slots(
    q, keys, values, positions, heads_table, part_out, part_lse,
    q_b, q_h, slots, group, extra, scale, splits,
    ROWS: tl.constexpr, SPLIT: tl.constexpr, BN: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of one group's queries (the rows) over `SPLIT` slots of one row and KV head."""
    split = tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1)
    first = tl.load(heads_table + 2 * head)
    size = tl.load(heads_table + 2 * head + 1) + extra
    low = split * SPLIT
    high = tl.minimum(low + SPLIT, size)
    lane = tl.arange(0, ROWS)
    d = tl.arange(0, DP)
    is_row = lane < group
    q_head = (head * group + lane).to(tl.int64)
    rows = load_rows(q + batch * q_b, q_head * q_h, d, is_row, D, DP, True)
    top = tl.full([ROWS], _LOW, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DP], tl.float32)
    base = batch * slots + first
    for start in range(low, high, BN):
        slot = start + tl.arange(0, BN)
        inside = slot < high
        at = base + slot
        held = tl.load(positions + at, mask=inside, other=_EMPTY) != _EMPTY
        k = load_rows(keys, at * D, d, inside, D, DP, True)
        v = load_rows(values, at * D, d, inside, D, DP, True)
        logits = tl.dot(rows, tl.trans(k), input_precision=PRECISION) * scale
        logits = tl.where(held[None, :], logits, -float("inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        weights = tl.exp2(logits - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
        top = new_top
    out_row = ((batch * heads * group + q_head) * splits + split).to(tl.int64)
    where = part_out + (out_row * D)[:, None] + d[None, :]
    tl.store(where, acc, mask=is_row[:, None] & (d < D)[None, :])
    tl.store(part_lse + 2 * out_row, top, mask=is_row)
    tl.store(part_lse + 2 * out_row + 1, total, mask=is_row)


@triton.jit
def _combine(
    part_out, part_lse, out, splits,
    SPLITS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Joins the splits of one query row."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, SPLITS)
    d = tl.arange(0, DP)
    inside = lane < splits
    at = row * splits + lane
    top = tl.load(part_lse + 2 * at, mask=inside, other=_LOW)
    total = tl.load(part_lse + 2 * at + 1, mask=inside, other=0.0)
    share = tl.exp2(top - tl.max(top, 0))
    mask = inside[:, None] & (d < D)[None, :]
    acc = tl.load(part_out + (at * D)[:, None] + d[None, :], mask=mask, other=0.0)
    joined = tl.sum(acc * share[:, None], 0) / tl.sum(total * share, 0)
    tl.store(out + row * D + d, joined.to(out.dtype.element_ty), mask=d < D)


@lru_cache(maxsize=64)
def _heads_table(layout: SlotLayout, device: torch.device) -> torch.Tensor:
    """int32 [G, 2]: first slot and k of each head."""
    rows, first = [], 0
    for k in layout.topk:
        rows.append((first, k))
        first += layout.sinks + k + layout.window
    return torch.tensor(rows, dtype=torch.int32, device=device)


def insert(state: SparseKState, key: torch.Tensor, value: torch.Tensor, score: torch.Tensor):
    """Puts one token per row into its slots, in place, and counts it.

    Args:
        key, value: [B, G, D], last dimension dense. score: [B, G] float64, effective.
    """
    layout = state.layout
    dim = state.keys.shape[2]
    score = score.contiguous()
    _insert[(state.batch, layout.heads)](
        state.keys, state.values, state.positions, state.scores, state.seen,
        _heads_table(layout, state.keys.device), key, value, score,
        key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        layout.total, layout.heads, layout.sinks, layout.window,
        D=dim, DP=triton.next_power_of_2(dim),
        BLOCK=min(1024, max(16, triton.next_power_of_2(max(layout.topk)))), num_warps=4,
    )  # fmt: skip
    state.seen.add_(1)


def decode(q: torch.Tensor, state: SparseKState, *, scale: float) -> torch.Tensor:
    """One query per row, q [B, H, 1, D], over every slot that holds a token; shaped like q."""
    batch, q_heads, _, dim = q.shape
    layout = state.layout
    group = q_heads // layout.heads
    if q.stride(3) != 1:
        q = q.contiguous()
    splits = triton.cdiv(layout.width, SPLIT)
    device = q.device
    part_out = torch.empty(batch, q_heads, splits, dim, dtype=torch.float32, device=device)
    part_lse = torch.empty(batch, q_heads, splits, 2, dtype=torch.float32, device=device)
    out = torch.empty(batch, q_heads, 1, dim, dtype=q.dtype, device=device)
    padded = max(16, triton.next_power_of_2(dim))
    _attend_slots[(splits, layout.heads, batch)](
        q, state.keys, state.values, state.positions, _heads_table(layout, device),
        part_out, part_lse, q.stride(0), q.stride(1), layout.total, group,
        layout.sinks + layout.window, scale * LOG2_E, splits,
        ROWS=max(16, triton.next_power_of_2(group)), SPLIT=SPLIT, BN=32 if padded > 128 else 64,
        D=dim, DP=padded, PRECISION=dot_precision(q.dtype), num_warps=4, num_stages=3,
    )  # fmt: skip
    _combine[(batch * q_heads,)](
        part_out, part_lse, out, splits,
        SPLITS=triton.next_power_of_2(splits), D=dim, DP=padded, num_warps=4,
    )  # fmt: skip
    return out
