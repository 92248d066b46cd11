"""One token for every row of a state: insertion into the slots, attention over them.

Two launches, and all shapes are those of the state, whatever the context: a step can be captured in
a CUDA graph.
Insertion keeps exactly the set that prefix selection keeps: the token that leaves the window takes
the slot of the worst selected key if its score is larger; of equal scores the latest token is the
worst, so a leaving token, later than all of them, needs a strictly larger one.
"""

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl

from sparsek_kernels.quantization import LARGEST, LEAST_SCALE
from sparsek_kernels.state import EMPTY, SlotLayout, SparseKState, StateRows
from sparsek_kernels.triton.tiles import LOG2_E, cap_of, capped, dot_precision, load_rows

_EMPTY = tl.constexpr(EMPTY)
_LOW = tl.constexpr(-1.0e30)
_WIDE = tl.constexpr(1 << 32)
_LARGEST = tl.constexpr(LARGEST)
_LOG2_E = tl.constexpr(LOG2_E)
_LEAST_SCALE = tl.constexpr(LEAST_SCALE)
LEAST_SLOTS = 64  # attended by one program
MOST_PROGRAMS = 1024  # of one launch, where fewer slots for each would only mean more of them
JOINED_NUMBERS = 8192  # float32 that the program which joins the splits holds at once


@triton.jit
def _store_row(rows, scales, target, x, d, mask, D: tl.constexpr, QUANTIZED: tl.constexpr):
    """A new key or value [D] into slot `target`; codes are those of quantization.quantize."""
    if QUANTIZED:
        x = x.to(tl.float32)
        scale = tl.div_rn(tl.max(tl.abs(x), 0), tl.full([], _LARGEST, tl.float32))
        scale = tl.maximum(scale, _LEAST_SCALE)
        x = tl.floor(tl.div_rn(x, scale + tl.zeros_like(x)) + 0.5)
        tl.store(scales + target, scale)
    tl.store(rows + target * D + d, x.to(rows.dtype.element_ty), mask=mask)


@triton.jit
def _move_row(
    rows, scales, source, target, moves, d, mask, D: tl.constexpr, QUANTIZED: tl.constexpr
):
    """Slot `source` also into slot `target`, where it moves."""
    row = tl.load(rows + source * D + d, mask=mask & moves, other=0)
    tl.store(rows + target * D + d, row, mask=mask & moves)
    if QUANTIZED:
        tl.store(scales + target, tl.load(scales + source), mask=moves)


@triton.jit
def _insert(
    keys, values, key_scale, value_scale, positions, scores, seen, rows, heads_table, arrived,
    new_key, new_value, new_score, slopes,
    nk_b, nk_h, nv_b, nv_h, ns_b, ns_h,
    keys_b, values_b, key_scale_b, value_scale_b, positions_b, scores_b, seen_b,
    heads, sinks, window,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, SLOPED: tl.constexpr,
    QUANTIZED: tl.constexpr, POOLED: tl.constexpr,
):  # fmt: skip
    """Puts the token of one row into the slots of one head; nothing has arrived there yet.

    Compiled without fused multiply-add: the effective score must be the one prefill computes.
    """
    batch = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    held_row = tl.load(rows + batch) if POOLED else batch
    keys += held_row * keys_b
    values += held_row * values_b
    key_scale += held_row * key_scale_b
    value_scale += held_row * value_scale_b
    positions += held_row * positions_b
    scores += held_row * scores_b
    base = tl.load(heads_table + 2 * head).to(tl.int64)
    k = tl.load(heads_table + 2 * head + 1)
    token = tl.load(seen + held_row * seen_b)
    tl.store(arrived + batch * heads + head, 0)
    effective = tl.load(new_score + batch * ns_b + head * ns_h).to(tl.float64)
    if SLOPED:
        effective += tl.load(slopes + head).to(tl.float64) * token.to(tl.float64)
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
        rival = tl.where(inside & (score == low), position, _EMPTY - 1).to(tl.int64)
        # One reduction for both: no two of them share a position, but for empty slots.
        chosen = tl.max(rival * _WIDE + slot, 0)
        last = (chosen >> 32).to(tl.int32)
        place = (chosen & (_WIDE - 1)).to(tl.int32)
        better = (low < worst) | ((low == worst) & (last > latest))
        loser = tl.where(better, base + sinks + place, loser)
        latest = tl.where(better, last, latest)
        worst = tl.where(better, low, worst)
    moves = (k > 0) & (leaving_position != _EMPTY) & (leaving_score > worst)
    _move_row(keys, key_scale, ring, loser, moves, d, mask, D, QUANTIZED)
    _move_row(values, value_scale, ring, loser, moves, d, mask, D, QUANTIZED)
    tl.store(positions + loser, leaving_position, mask=moves)
    tl.store(scores + loser, leaving_score, mask=moves)
    tl.debug_barrier()  # the ring row was read by all threads before it is overwritten
    target = tl.where(token < sinks, base + token, ring)
    row = tl.load(new_key + batch * nk_b + head * nk_h + d, mask=mask, other=0.0)
    _store_row(keys, key_scale, target, row, d, mask, D, QUANTIZED)
    row = tl.load(new_value + batch * nv_b + head * nv_h + d, mask=mask, other=0.0)
    _store_row(values, value_scale, target, row, d, mask, D, QUANTIZED)
    tl.store(positions + target, token.to(tl.int32))
    tl.store(scores + target, effective)


@triton.jit
def _join_splits(
    part_out, part_lse, out, nothing, row_head, head, group, splits, d,
    D: tl.constexpr, SPLITS: tl.constexpr, GROUP: tl.constexpr, SINK_LOGITS: tl.constexpr,
):  # fmt: skip
    """The queries of one row and KV head from what all programs made of their slots."""
    part = tl.arange(0, SPLITS)[:, None]
    member = tl.arange(0, GROUP)[None, :]
    inside = (part < splits) & (member < group)
    row = row_head * group + member
    at = row * splits + part
    # Written by other multiprocessors: not from this one's own cache.
    top = tl.load(part_lse + 2 * at, mask=inside, other=_LOW, cache_modifier=".cg")
    total = tl.load(part_lse + 2 * at + 1, mask=inside, other=0.0, cache_modifier=".cg")
    highest = tl.max(top, 0)
    share = tl.exp2(top - highest[None, :])
    whole = tl.sum(total * share, 0)
    where = part_out + (at * D)[:, :, None] + d[None, None, :]
    real = inside[:, :, None] & (d < D)[None, None, :]
    acc = tl.load(where, mask=real, other=0.0, cache_modifier=".cg")
    lane = tl.arange(0, GROUP)
    if SINK_LOGITS:
        logit = tl.load(nothing + head * group + lane, mask=lane < group, other=0.0).to(tl.float32)
        whole += tl.exp2(logit * _LOG2_E - highest)
    joined = tl.sum(acc * share[:, :, None], 0) / whole[:, None]
    where = out + ((row_head * group + lane) * D)[:, None] + d[None, :]
    mask = (lane < group)[:, None] & (d < D)[None, :]
    tl.store(where, joined.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _attend_slots(
    q, keys, values, key_scale, value_scale, positions, seen, pool_rows, heads_table,
    part_out, part_lse, arrived, out, nothing,
    q_b, q_h, keys_b, values_b, key_scale_b, value_scale_b, positions_b, seen_b,
    group, extra, scale, cap, splits, split_slots,
    ROWS: tl.constexpr, BN: tl.constexpr, SPLITS: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, PRECISION: tl.constexpr, QUANTIZED: tl.constexpr,
    POOLED: tl.constexpr, CAPPED: tl.constexpr, SINK_LOGITS: tl.constexpr,
):  # fmt: skip
    """Attention of one group's queries (the rows) over `split_slots` slots of a row and KV head.

    Whoever of a head's programs comes last joins the splits; one program counts the row's token.
    """
    split = tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1)
    held_row = tl.load(pool_rows + batch) if POOLED else batch
    keys += held_row * keys_b
    values += held_row * values_b
    key_scale += held_row * key_scale_b
    value_scale += held_row * value_scale_b
    positions += held_row * positions_b
    seen += held_row * seen_b
    base = tl.load(heads_table + 2 * head).to(tl.int64)
    size = tl.load(heads_table + 2 * head + 1) + extra
    low = split * split_slots
    high = tl.minimum(low + split_slots, size)
    lane = tl.arange(0, ROWS)
    d = tl.arange(0, DP)
    is_row = lane < group
    q_head = (head * group + lane).to(tl.int64)
    rows = load_rows(q + batch * q_b, q_head * q_h, d, is_row, D, DP, True)
    top = tl.full([ROWS], _LOW, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DP], tl.float32)
    for start in range(low, high, BN):
        slot = start + tl.arange(0, BN)
        inside = slot < high
        at = base + slot
        held = tl.load(positions + at, mask=inside, other=_EMPTY) != _EMPTY
        k = load_rows(keys, at * D, d, inside, D, DP, True)
        v = load_rows(values, at * D, d, inside, D, DP, True)
        if QUANTIZED:
            k = k.to(rows.dtype)  # a code is exact in any of these types
            v = v.to(rows.dtype)
        logits = tl.dot(rows, tl.trans(k), input_precision=PRECISION) * scale
        if QUANTIZED:
            logits *= tl.load(key_scale + at, mask=inside, other=0.0)[None, :]
        if CAPPED:
            logits = capped(logits, cap)
        logits = tl.where(held[None, :], logits, -float("inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        weights = tl.exp2(logits - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        if QUANTIZED:
            weights *= tl.load(value_scale + at, mask=inside, other=0.0)[None, :]
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
        top = new_top
    if (split == 0) & (head == 0):
        tl.store(seen, tl.load(seen) + 1)  # nobody else reads it in this launch
    out_row = (batch * heads * group + q_head) * splits
    mask = is_row[:, None] & (d < D)[None, :]
    tl.store(part_out + ((out_row + split) * D)[:, None] + d[None, :], acc, mask=mask)
    tl.store(part_lse + 2 * (out_row + split), top, mask=is_row)
    tl.store(part_lse + 2 * (out_row + split) + 1, total, mask=is_row)
    tl.debug_barrier()  # all of the program's stores come before its arrival
    before = tl.atomic_add(arrived + batch * heads + head, 1, sem="acq_rel")
    if before == splits - 1:
        _join_splits(
            part_out, part_lse, out, nothing, batch * heads + head, head, group, splits, d,
            D, SPLITS, GROUP, SINK_LOGITS,
        )  # fmt: skip


def _splits(layout: SlotLayout, batch: int, group: int, padded: int) -> tuple[int, int]:
    """(programs per head, slots of each) for an attention that waits for its slowest program."""
    at_once = JOINED_NUMBERS // (triton.next_power_of_2(group) * padded)
    programs = MOST_PROGRAMS // (batch * layout.heads)
    most = max(1, min(at_once, programs, triton.cdiv(layout.width, LEAST_SLOTS)))
    slots = triton.cdiv(triton.cdiv(layout.width, most), LEAST_SLOTS) * LEAST_SLOTS
    return triton.cdiv(layout.width, slots), slots


@cache
def _heads_table(layout: SlotLayout, device: torch.device) -> torch.Tensor:
    """int32 [G, 2]: first slot and k of each head; never dropped, captured graphs read it."""
    rows, first = [], 0
    for k in layout.topk:
        rows.append((first, k))
        first += layout.sinks + k + layout.window
    return torch.tensor(rows, dtype=torch.int32, device=device)


def step(
    q: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score: torch.Tensor,
    slopes: torch.Tensor | None,
    state: SparseKState | StateRows,
    *,
    scale: float,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Puts one token per row into its slots, in place, counts it, and attends to all slots.

    Args:
        q: [B, H, 1, D]. key, value: [B, G, 1, D]. score: [B, G, 1], any floating dtype.
        slopes: [G] or None. softcap, sink_logits [H]: as in sparsek_attention.

    Returns:
        [B, H, 1, D] in q's dtype.
    """
    layout = state.layout
    pool, rows = (state.pool, state.rows) if isinstance(state, StateRows) else (state, None)
    pool.support = pool.tau = None
    tensors = (
        pool.keys, pool.values, pool.key_scale, pool.value_scale,
        pool.positions, pool.scores, pool.seen, rows, sink_logits,
    )  # fmt: skip
    run = _step_op if torch.compiler.is_compiling() else _step
    settings = layout.topk, layout.window, layout.sinks, scale, softcap
    return run(q, key, value, score, slopes, *tensors, *settings)


def _step(
    q, key, value, score, slopes, keys, values, key_scale, value_scale, positions, scores, seen,
    rows, sink_logits, topk, window, sinks, scale, softcap,
) -> torch.Tensor:  # fmt: skip
    layout, device = SlotLayout(tuple(topk), window, sinks), q.device
    batch, q_heads, _, dim = q.shape
    groups, group = layout.heads, q_heads // layout.heads
    q, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (q, key, value))
    table = _heads_table(layout, device)
    arrived = torch.empty(batch, groups, dtype=torch.int32, device=device)
    sloped, quantized = slopes is not None, key_scale is not None
    scales = (key_scale, value_scale) if quantized else (scores, scores)  # else never read
    pooled = rows is not None
    pool_rows = rows if pooled else seen  # else never read
    held = (keys, values, *scales, positions, scores, seen)
    strides = [tensor.stride(0) for tensor in held]
    _insert[(batch, groups)](
        *held, pool_rows, table, arrived,
        key, value, score, slopes if sloped else score,
        key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        score.stride(0), score.stride(1), *strides, groups, sinks, window,
        D=dim, DP=triton.next_power_of_2(dim),
        BLOCK=min(1024, max(16, triton.next_power_of_2(max(layout.topk)))), SLOPED=sloped,
        QUANTIZED=quantized, POOLED=pooled, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    padded = max(16, triton.next_power_of_2(dim))
    splits, split_slots = _splits(layout, batch, group, padded)
    part_out = torch.empty(batch, q_heads, splits, dim, dtype=torch.float32, device=device)
    part_lse = torch.empty(batch, q_heads, splits, 2, dtype=torch.float32, device=device)
    out = torch.empty(batch, q_heads, 1, dim, dtype=q.dtype, device=device)
    _attend_slots[(splits, groups, batch)](
        q, keys, values, *scales, positions, seen, pool_rows, table,
        part_out, part_lse, arrived, out, q if sink_logits is None else sink_logits,
        q.stride(0), q.stride(1), *strides[:5], strides[6],
        group, sinks + window, scale * LOG2_E, cap_of(softcap), splits, split_slots,
        ROWS=max(16, triton.next_power_of_2(group)), BN=32 if padded > 128 else 64,
        SPLITS=triton.next_power_of_2(splits), GROUP=triton.next_power_of_2(group),
        D=dim, DP=padded, PRECISION=dot_precision(q.dtype), QUANTIZED=quantized,
        POOLED=pooled, CAPPED=softcap is not None, SINK_LOGITS=sink_logits is not None,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    return out


@torch.library.custom_op(
    "sparsek::decode_step",
    mutates_args=("keys", "values", "key_scale", "value_scale", "positions", "scores", "seen"),
)
def _step_op(
    q: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score: torch.Tensor,
    slopes: torch.Tensor | None,
    keys: torch.Tensor,
    values: torch.Tensor,
    key_scale: torch.Tensor | None,
    value_scale: torch.Tensor | None,
    positions: torch.Tensor,
    scores: torch.Tensor,
    seen: torch.Tensor,
    rows: torch.Tensor | None,
    sink_logits: torch.Tensor | None,
    topk: Sequence[int],
    window: int,
    sinks: int,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """`step` as torch.compile sees it: one opaque node that changes the state in place."""
    return _step(
        q, key, value, score, slopes, keys, values, key_scale, value_scale, positions, scores, seen,
        rows, sink_logits, topk, window, sinks, scale, softcap,
    )  # fmt: skip


@_step_op.register_fake
def _(q, *_):
    return q.new_empty(q.shape)
