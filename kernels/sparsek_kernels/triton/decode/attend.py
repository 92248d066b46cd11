"""One query per head over all slots, split among programs and joined by the last of them."""

import triton
import triton.language as tl

from sparsek_kernels.state import EMPTY, SlotLayout
from sparsek_kernels.triton.stand_ins import log2_missing
from sparsek_kernels.triton.tiles import LOG2_E, capped, load_rows

_EMPTY = tl.constexpr(EMPTY)
_LOW = tl.constexpr(-1.0e30)
_LOG2_E = tl.constexpr(LOG2_E)
LEAST_SLOTS = 64  # attended by one program
MOST_PROGRAMS = 1024  # of one launch, where fewer slots for each would only mean more of them
JOINED_NUMBERS = 8192  # float32 that the program which joins the splits holds at once


@triton.jit
def _with_stand_ins(
    acc, highest, whole, rows, pairs, q_head, real, d, missing, scale,
    D: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Sums [GROUP, DP] and totals [GROUP], over 2^highest, with stand-ins among what is summed.

    rows: the queries [GROUP, DP]. pairs: [H, M, 2 D + 2]. missing: see `log2_missing`.
    """
    pair = (pairs + q_head * (M * (2 * D + 2)))[:, None] + d[None, :]
    bias = pairs + q_head * (M * (2 * D + 2)) + 2 * D
    there = tl.sum(real.to(tl.int32), 1) > 0
    for _ in tl.static_range(M):
        key = tl.load(pair, mask=real, other=0.0).to(tl.float32)
        value = tl.load(pair + D, mask=real, other=0.0).to(tl.float32)
        limit = tl.load(bias + 1, mask=there, other=0.0).to(tl.float32) * _LOG2_E
        logit = tl.sum(rows.to(tl.float32) * key, 1) * scale + tl.minimum(missing, limit)
        logit += tl.load(bias, mask=there, other=0.0).to(tl.float32) * _LOG2_E
        top = tl.maximum(highest, logit)
        shrink, own = tl.exp2(highest - top), tl.exp2(logit - top)
        acc = acc * shrink[:, None] + own[:, None] * value
        whole = whole * shrink + own
        highest = top
        pair += 2 * D + 2
        bias += 2 * D + 2
    return acc, whole


@triton.jit
def join_splits(
    part_out, part_lse, out, nothing, q, q_h, pairs, row_head, head, group, splits, d, missing,
    scale, D: tl.constexpr, SPLITS: tl.constexpr, GROUP: tl.constexpr, SINK_LOGITS: tl.constexpr,
    STAND_INS: tl.constexpr,
):  # fmt: skip
    """The queries of one row and KV head from what all programs made of their slots.

    q: pointer to the row's queries. missing: `log2_missing` of the row and head, where there are
    STAND_INS of each query head.
    """
    part = tl.arange(0, SPLITS)[:, None]
    member = tl.arange(0, GROUP)[None, :]
    inside = (part < splits) & (member < group)
    row = row_head * group + member
    at = row * splits + part
    # Written by other multiprocessors: not from this one's own cache.
    top = tl.load(part_lse + 2 * at, mask=inside, other=_LOW, cache_modifier=".cg")
    total = tl.load(part_lse + 2 * at + 1, mask=inside, other=0.0, cache_modifier=".cg")
    where = part_out + (at * D)[:, :, None] + d[None, None, :]
    real = inside[:, :, None] & (d < D)[None, None, :]
    acc = tl.load(where, mask=real, other=0.0, cache_modifier=".cg")
    highest = tl.max(top, 0)
    share = tl.exp2(top - highest[None, :])
    whole = tl.sum(total * share, 0)
    lane = tl.arange(0, GROUP)
    if SINK_LOGITS:
        logit = tl.load(nothing + head * group + lane, mask=lane < group, other=0.0).to(tl.float32)
        whole += tl.exp2(logit * _LOG2_E - highest)
    joined = tl.sum(acc * share[:, :, None], 0)
    if STAND_INS > 0:
        q_head = (head * group + lane).to(tl.int64)
        real = (lane < group)[:, None] & (d < D)[None, :]
        rows = tl.load(q + (q_head * q_h)[:, None] + d[None, :], mask=real, other=0.0)
        joined, whole = _with_stand_ins(
            joined, highest, whole, rows, pairs, q_head, real, d, missing, scale, D, STAND_INS
        )
    joined /= whole[:, None]
    where = out + ((row_head * group + lane) * D)[:, None] + d[None, :]
    mask = (lane < group)[:, None] & (d < D)[None, :]
    tl.store(where, joined.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize_on_alignment=("pool_rows",))
def attend_slots(
    q, keys, values, key_scale, value_scale, positions, seen, pool_rows, heads_table,
    part_out, part_lse, arrived, out, nothing, pairs,
    q_b, q_h, keys_b, values_b, key_scale_b, value_scale_b, positions_b, seen_b,
    group, extra, scale, cap, splits, split_slots,
    ROWS: tl.constexpr, BN: tl.constexpr, SPLITS: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, PRECISION: tl.constexpr, QUANTIZED: tl.constexpr,
    POOLED: tl.constexpr, CAPPED: tl.constexpr, SINK_LOGITS: tl.constexpr,
    STAND_INS: tl.constexpr,
):  # fmt: skip
    """Attention of one group's queries (the rows) over `split_slots` slots of a row and KV head.

    Whoever of a head's programs comes last joins the splits; one program counts the row's token,
    whose place stands behind `arrived` where somebody asks for it.
    """
    split = tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1)
    held_row = tl.load(pool_rows + batch).to(tl.int64) if POOLED else batch
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
        missing = 0.0
        if STAND_INS > 0:
            places = arrived + tl.num_programs(2) * heads
            missing = log2_missing(tl.load(places + batch * heads + head), size)
        join_splits(
            part_out, part_lse, out, nothing, q + batch * q_b, q_h, pairs, batch * heads + head,
            head, group, splits, d, missing, scale, D, SPLITS, GROUP, SINK_LOGITS, STAND_INS,
        )  # fmt: skip


def splits_of(layout: SlotLayout, batch: int, group: int, padded: int) -> tuple[int, int]:
    """(programs per head, slots of each) for an attention that waits for its slowest program."""
    at_once = JOINED_NUMBERS // (triton.next_power_of_2(group) * padded)
    programs = MOST_PROGRAMS // (batch * layout.heads)
    most = max(1, min(at_once, programs, triton.cdiv(layout.width, LEAST_SLOTS)))
    slots = triton.cdiv(triton.cdiv(layout.width, most), LEAST_SLOTS) * LEAST_SLOTS
    return triton.cdiv(layout.width, slots), slots
