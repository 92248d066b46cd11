"""A token enters the slots of its row and attends to them, in one launch.

Every program of a row and KV head finds out by itself which slot loses its key, and attends to some
of the slots as they will be: what changes is put in place in registers. Whoever of a head's
programs comes last, when none of them reads the slots any more, changes them and joins the splits.
"""

import triton
import triton.language as tl

from sparsek_kernels.state import EMPTY
from sparsek_kernels.triton.decode.attend import join_splits
from sparsek_kernels.triton.decode.insert import coded, worst_slot
from sparsek_kernels.triton.effective import effective_score
from sparsek_kernels.triton.stand_ins import log2_missing
from sparsek_kernels.triton.tiles import capped, load_rows

_EMPTY = tl.constexpr(EMPTY)
_LOW = tl.constexpr(-1.0e30)


@triton.jit
def _scales(scales, at, inside, QUANTIZED: tl.constexpr):
    """[BN] scales of slots; nothing where rows are no codes."""
    if QUANTIZED:
        return tl.load(scales + at, mask=inside, other=0.0)
    else:
        return 0.0


@triton.jit
def _one_scale(scales, at, QUANTIZED: tl.constexpr):
    if QUANTIZED:
        return tl.load(scales + at)
    else:
        return 0.0


@triton.jit
def _put(rows, scale, slot, target, moves, row, row_scale, QUANTIZED: tl.constexpr):
    """Tile `rows` [BN, DP] of slots [BN], and its scales, with `row` [DP] in slot `target`."""
    here = (slot == target) & moves
    rows = tl.where(here[:, None], row[None, :], rows)
    if QUANTIZED:
        scale = tl.where(here, row_scale, scale)
    return rows, scale


@triton.jit
def _store_slot(
    keys, values, key_scale, value_scale, positions, scores, slot, key, value, own_key_scale,
    own_value_scale, position, score, d, mask, here, D: tl.constexpr, QUANTIZED: tl.constexpr,
):  # fmt: skip
    """All of a slot, if it is meant (`here`)."""
    tl.store(keys + slot * D + d, key, mask=mask & here)
    tl.store(values + slot * D + d, value, mask=mask & here)
    if QUANTIZED:
        tl.store(key_scale + slot, own_key_scale, mask=here)
        tl.store(value_scale + slot, own_value_scale, mask=here)
    tl.store(positions + slot, position, mask=here)
    tl.store(scores + slot, score, mask=here)


@triton.jit
def _attend(
    rows, keys, values, key_scale, value_scale, positions, base, slot, high, d,
    key_tile, value_tile, tile_key_scale, tile_value_scale, held,
    loser, moves, leaving_key, leaving_value, leaving_key_scale, leaving_value_scale,
    target, own_key, own_value, own_key_scale, own_value_scale, scale, cap,
    ROWS: tl.constexpr, BN: tl.constexpr, BLOCKS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    PRECISION: tl.constexpr, QUANTIZED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """(sums [ROWS, DP], largest logits, totals [ROWS]) of BN * BLOCKS slots as they will be.

    Of the first block (`slot`) all is there already, as it was; each next one is asked for before
    the last is used.
    """
    at, inside = base + slot, slot < high
    top = tl.full([ROWS], _LOW, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DP], tl.float32)
    for block in range(BLOCKS):
        now = at
        now_held = held | ((now == loser) & moves) | (now == target)
        k_tile, k_scale = _put(
            key_tile, tile_key_scale, now, loser, moves, leaving_key, leaving_key_scale, QUANTIZED
        )
        k_tile, k_scale = _put(
            k_tile, k_scale, now, target, True, own_key, own_key_scale, QUANTIZED
        )
        v_tile, v_scale = _put(
            value_tile, tile_value_scale, now, loser, moves, leaving_value, leaving_value_scale,
            QUANTIZED,
        )  # fmt: skip
        v_tile, v_scale = _put(
            v_tile, v_scale, now, target, True, own_value, own_value_scale, QUANTIZED
        )
        now_inside = inside
        if BLOCKS > 1:
            slot += BN
            inside = (slot < high) & (block + 1 < BLOCKS)
            at = base + slot
            key_tile = load_rows(keys, at * D, d, inside, D, DP, True)
            value_tile = load_rows(values, at * D, d, inside, D, DP, True)
            tile_key_scale = _scales(key_scale, at, inside, QUANTIZED)
            tile_value_scale = _scales(value_scale, at, inside, QUANTIZED)
            held = tl.load(positions + at, mask=inside, other=_EMPTY) != _EMPTY
        if QUANTIZED:
            k_tile = k_tile.to(rows.dtype)  # a code is exact in any of these types
            v_tile = v_tile.to(rows.dtype)
        logits = tl.dot(rows, tl.trans(k_tile), input_precision=PRECISION) * scale
        if QUANTIZED:
            logits *= k_scale[None, :]
        if CAPPED:
            logits = capped(logits, cap)
        logits = tl.where((now_held & now_inside)[None, :], logits, -float("inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        weights = tl.exp2(logits - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        if QUANTIZED:
            weights *= v_scale[None, :]
        acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)
        top = new_top
    return acc, top, total


@triton.jit(
    do_not_specialize=("ns_b", "ns_h"), do_not_specialize_on_alignment=("new_score", "pool_rows")
)
def insert_and_attend(
    q, new_key, new_value, new_score, slopes,
    keys, values, key_scale, value_scale, positions, scores, seen, pool_rows, heads_table,
    part_out, part_lse, arrived, out, nothing, pairs, q_b, q_h, nk_b, nk_h, nv_b, nv_h,
    ns_b, ns_h, keys_b, values_b, key_scale_b, value_scale_b, positions_b, scores_b, seen_b,
    group, sinks, window, scale, cap, splits,
    ROWS: tl.constexpr, BN: tl.constexpr, BLOCKS: tl.constexpr, SPLITS: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, SLOPED: tl.constexpr, QUANTIZED: tl.constexpr, POOLED: tl.constexpr,
    CAPPED: tl.constexpr, SINK_LOGITS: tl.constexpr, STAND_INS: tl.constexpr, WAITS: tl.constexpr,
    AT_REST: tl.constexpr,
):  # fmt: skip
    """One row's token of one KV head, and its queries over BN * BLOCKS slots.

    Compiled without fused multiply-add: the effective score must be the one prefill computes.
    """
    split, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    batch = tl.program_id(2).to(tl.int64)
    if WAITS:
        tl.extra.cuda.gdc_launch_dependents()
        if not AT_REST:
            tl.extra.cuda.gdc_wait()
    held_row = tl.load(pool_rows + batch).to(tl.int64) if POOLED else batch
    keys += held_row * keys_b
    values += held_row * values_b
    key_scale += held_row * key_scale_b
    value_scale += held_row * value_scale_b
    positions += held_row * positions_b
    scores += held_row * scores_b
    base, k = tl.load(heads_table + 2 * head).to(tl.int64), tl.load(heads_table + 2 * head + 1)
    token = tl.load(seen + held_row * seen_b)
    d = tl.arange(0, DP)
    high = sinks + k + window
    slot = split * (BN * BLOCKS) + tl.arange(0, BN)
    at, inside = base + slot, slot < high
    # All that stood here before this step.
    key_tile = load_rows(keys, at * D, d, inside, D, DP, True)
    value_tile = load_rows(values, at * D, d, inside, D, DP, True)
    tile_key_scale = _scales(key_scale, at, inside, QUANTIZED)
    tile_value_scale = _scales(value_scale, at, inside, QUANTIZED)
    held = tl.load(positions + at, mask=inside, other=_EMPTY) != _EMPTY
    ring = base + sinks + k + token % window
    mask = d < D
    leaving_position, leaving_score = tl.load(positions + ring), tl.load(scores + ring)
    leaving_key = tl.load(keys + ring * D + d, mask=mask, other=0)
    leaving_value = tl.load(values + ring * D + d, mask=mask, other=0)
    leaving_key_scale = _one_scale(key_scale, ring, QUANTIZED)
    leaving_value_scale = _one_scale(value_scale, ring, QUANTIZED)
    loser, worst = worst_slot(positions, scores, base + sinks, k, BLOCK)
    moves = (k > 0) & (leaving_position != _EMPTY) & (leaving_score > worst)
    target = tl.where(token < sinks, base + token, ring)
    if WAITS and AT_REST:
        tl.extra.cuda.gdc_wait()
    # The step's own.
    lane = tl.arange(0, ROWS)
    is_row = lane < group
    q_head = (head * group + lane).to(tl.int64)
    rows = load_rows(q + batch * q_b, q_head * q_h, d, is_row, D, DP, True)
    slope = tl.load(slopes + head) if SLOPED else 0.0
    score = tl.load(new_score + batch * ns_b + head * ns_h)
    effective = effective_score(score, slope, token, SLOPED)
    own_key = tl.load(new_key + batch * nk_b + head * nk_h + d, mask=mask, other=0.0)
    own_value = tl.load(new_value + batch * nv_b + head * nv_h + d, mask=mask, other=0.0)
    own_key, own_key_scale = coded(own_key, keys, QUANTIZED)
    own_value, own_value_scale = coded(own_value, values, QUANTIZED)
    acc, top, total = _attend(
        rows, keys, values, key_scale, value_scale, positions, base, slot, high, d,
        key_tile, value_tile, tile_key_scale, tile_value_scale, held,
        loser, moves, leaving_key, leaving_value, leaving_key_scale, leaving_value_scale,
        target, own_key, own_value, own_key_scale, own_value_scale, scale, cap,
        ROWS, BN, BLOCKS, D, DP, PRECISION, QUANTIZED, CAPPED,
    )  # fmt: skip
    part = (batch * heads * group + q_head) * splits + split
    where = part_out + (part * D)[:, None] + d[None, :]
    tl.store(where, acc, mask=is_row[:, None] & mask[None, :])
    tl.store(part_lse + 2 * part, top, mask=is_row)
    tl.store(part_lse + 2 * part + 1, total, mask=is_row)
    tl.debug_barrier()  # all of the program's loads and stores come before its arrival
    counter = arrived + batch * (heads + 1)
    before = tl.atomic_add(counter + head, 1, sem="acq_rel")
    if before == splits - 1:
        _store_slot(
            keys, values, key_scale, value_scale, positions, scores, loser, leaving_key,
            leaving_value, leaving_key_scale, leaving_value_scale, leaving_position, leaving_score,
            d, mask, moves, D, QUANTIZED,
        )  # fmt: skip
        _store_slot(
            keys, values, key_scale, value_scale, positions, scores, target, own_key, own_value,
            own_key_scale, own_value_scale, token.to(tl.int32), effective, d, mask, True, D,
            QUANTIZED,
        )  # fmt: skip
        join_splits(
            part_out, part_lse, out, nothing, q + batch * q_b, q_h, pairs, batch * heads + head,
            head, group, splits, d, log2_missing(token, high), scale,
            D, SPLITS, GROUP, SINK_LOGITS, STAND_INS,
        )  # fmt: skip
        tl.store(counter + head, 0)  # as the next step finds it
        if tl.atomic_add(counter + heads, 1, sem="acq_rel") == heads - 1:
            tl.store(counter + heads, 0)
            tl.store(seen + held_row * seen_b, token + 1)  # all have read it
