"""A new token enters the slots, and the selected set stays the one that prefix selection keeps."""

import triton
import triton.language as tl

from sparsek_kernels.quantization import LEAST_SCALE, STEP
from sparsek_kernels.state import EMPTY
from sparsek_kernels.triton.effective import effective_score

_EMPTY = tl.constexpr(EMPTY)
_WIDE = tl.constexpr(1 << 32)
_STEP = tl.constexpr(STEP)
_LEAST_SCALE = tl.constexpr(LEAST_SCALE)


@triton.jit
def coded(x, rows, QUANTIZED: tl.constexpr):
    """A new key or value [D] as `rows` hold it, and its scale; see quantization.quantize."""
    if QUANTIZED:
        x = x.to(tl.float32)
        scale = tl.max(tl.abs(x), 0) * _STEP
        scale = tl.maximum(scale, _LEAST_SCALE)
        x = tl.floor(tl.div_rn(x, scale + tl.zeros_like(x)) + 0.5)
        return x.to(rows.dtype.element_ty), scale
    else:
        return x.to(rows.dtype.element_ty), 0.0


@triton.jit
def _store_row(rows, scales, target, x, d, mask, D: tl.constexpr, QUANTIZED: tl.constexpr):
    """A new key or value [D] into slot `target`."""
    row, scale = coded(x, rows, QUANTIZED)
    if QUANTIZED:
        tl.store(scales + target, scale)
    tl.store(rows + target * D + d, row, mask=mask)


@triton.jit
def worst_slot(positions, scores, first, k, BLOCK: tl.constexpr):
    """(slot, score) of the worst of the k selected slots from `first` on.

    An empty one is worse than any key; of equal scores the latest token is the worst. With k = 0
    nobody may use the slot.
    """
    worst = tl.full([], float("inf"), tl.float64)
    latest = -1
    loser = first
    for start in range(0, k, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        inside = slot < k
        position = tl.load(positions + first + slot, mask=inside, other=0)
        score = tl.load(scores + first + slot, mask=inside, other=float("inf"))
        score = tl.where(inside & (position == _EMPTY), -float("inf"), score)
        low = tl.min(score, 0)
        rival = tl.where(inside & (score == low), position, _EMPTY - 1).to(tl.int64)
        # One reduction for both: no two of them share a position, but for empty slots.
        chosen = tl.max(rival * _WIDE + slot, 0)
        last = (chosen >> 32).to(tl.int32)
        place = (chosen & (_WIDE - 1)).to(tl.int32)
        better = (low < worst) | ((low == worst) & (last > latest))
        loser = tl.where(better, first + place, loser)
        latest = tl.where(better, last, latest)
        worst = tl.where(better, low, worst)
    return loser, worst


@triton.jit
def _move_row(
    rows, scales, source, target, moves, d, mask, D: tl.constexpr, QUANTIZED: tl.constexpr
):
    """Slot `source` also into slot `target`, where it moves."""
    row = tl.load(rows + source * D + d, mask=mask & moves, other=0)
    tl.store(rows + target * D + d, row, mask=mask & moves)
    if QUANTIZED:
        tl.store(scales + target, tl.load(scales + source), mask=moves)


# Scores of a step that also reads lie apart by its tokens.
@triton.jit(
    do_not_specialize=("ns_b", "ns_h"), do_not_specialize_on_alignment=("new_score", "rows")
)
def insert(
    keys, values, key_scale, value_scale, positions, scores, seen, rows, heads_table, arrived,
    new_key, new_value, new_score, slopes,
    nk_b, nk_h, nv_b, nv_h, ns_b, ns_h,
    keys_b, values_b, key_scale_b, value_scale_b, positions_b, scores_b, seen_b,
    heads, sinks, window,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, SLOPED: tl.constexpr,
    QUANTIZED: tl.constexpr, POOLED: tl.constexpr,
):  # fmt: skip
    """Puts the token of one row into the slots of one head; nothing has arrived there yet.

    The token's place is left behind `arrived` of all rows and heads.

    Compiled without fused multiply-add: the effective score must be the one prefill computes.
    """
    batch = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    held_row = tl.load(rows + batch).to(tl.int64) if POOLED else batch
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
    tl.store(arrived + (tl.num_programs(0) + batch) * heads + head, token.to(tl.int32))
    slope = tl.load(slopes + head) if SLOPED else 0.0
    score = tl.load(new_score + batch * ns_b + head * ns_h)
    effective = effective_score(score, slope, token, SLOPED)
    ring = base + sinks + k + token % window
    leaving_position = tl.load(positions + ring)
    leaving_score = tl.load(scores + ring)
    d = tl.arange(0, DP)
    mask = d < D
    loser, worst = worst_slot(positions, scores, base + sinks, k, BLOCK)
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
