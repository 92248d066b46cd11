"""The forward pass on Hopper, with warps that copy and warps that compute.

It computes what `forward._attend` computes for the gate `straight_through`, and is written in
Gluon because Triton itself waits for every product directly after issuing it. A tile is 128 rows:
`BQ` queries times `HG` heads. One warpgroup copies the tile's Q, and its K and V rows into a ring
of `STAGES` shared buffers; two warpgroups of 64 rows each multiply. A consumer issues the logits of
the next keys and the product of the last weights together, and takes its softmax meanwhile (the
schedule of FlashAttention-3, arXiv 2407.08608, section 3).

Masks are computed by the copying warps.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from sparsek_kernels.triton.geometry import Geometry
from sparsek_kernels.triton.hopper.tiles import (
    COPIERS,
    HALF,
    ROWS,
    SIZES,
    copy_rows,
    heads_of_tile,
    items,
    masked_keys,
    rows_at,
    thread_sums,
    within,
)
from sparsek_kernels.triton.hopper.work import programs, rows_of, work_of
from sparsek_kernels.triton.launches.launch import launch
from sparsek_kernels.triton.lists import KeyLists
from sparsek_kernels.triton.tiles import LOG2_E, empty_rows, needs_wide_index, strides

KEYS, STAGES = 128, 3  # per step, steps in the ring: measured best, and what shared memory holds


@gluon.jit
def _clear_keys(step, lane, span, listed, BN: gl.constexpr):
    """Keys [BN] of a step without masks."""
    item = step * BN + lane
    if step * BN + BN <= span.near:
        key = span.first_near + item
    else:
        key = gl.load(listed + (item - span.near), mask=item >= span.near, other=0)
        key = gl.where(item < span.near, span.first_near + item, key)
    return key


@gluon.jit
def _copy(
    bases, places, lines, shape, columns, window, end, first, count, stride,
    q_s, k_s, v_s, ranges, keys_s, full, masked, free, q_full, q_free,
    SIZE: gl.constexpr, BQ: gl.constexpr, HG: gl.constexpr, BN: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr, WIDE: gl.constexpr, REGULAR: gl.constexpr,
):  # fmt: skip
    """Copies Q of every tile, and K and V of every step of it.

    `full` of step i also says that V of step i - 1 is there; behind a tile's last step comes one
    that copies nothing.
    """
    LINE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    lane = gl.arange(0, BN, layout=gl.SliceLayout(1, LINE))
    flat_lane = gl.arange(0, BN, layout=gl.BlockedLayout([1], [32], [4], [0]))
    d = gl.arange(0, D, layout=gl.SliceLayout(0, LINE))
    q_ptr, k_ptr, v_ptr = bases
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n = places
    heads, group, queries, row_keys = shape
    ring = first * 0  # steps before this tile's
    turn = ring  # those of them with masks
    turns = ring  # tiles
    for index in range(first, count, stride):
        exists, batch, head, q_head, query, span, listed = work_of(
            index, lines, shape, columns, window, SIZE, BQ, HG, REGULAR
        )
        if exists:
            k_base = k_ptr + batch * k_b + head.to(gl.int64) * k_h
            v_base = v_ptr + batch * v_b + head.to(gl.int64) * v_h
            ends = end + (batch * heads + head) * row_keys
            clear, steps = items(span, BN)
            mbarrier.wait(q_free, (turns & 1) ^ 1)
            for half in gl.static_range(2):
                at, inside = rows_at(
                    q_ptr + batch * q_b, query, q_head, half * HALF, span.t1 - span.t0, q_n, q_h,
                    HG, D,
                )  # fmt: skip
                async_copy.async_copy_global_to_shared(q_s.index(half), at, mask=inside)
            async_copy.mbarrier_arrive(q_full, increment_count=False)
            for step in range(clear):
                key = _clear_keys(step, lane, span, listed, BN)
                place = ring + step
                slot = place % STAGES
                copy_rows(k_base, key, k_n, d, k_s.index(slot), WIDE)
                async_copy.mbarrier_arrive(full.index(slot), increment_count=False)
                # Step i frees K of step i and V of step i - 1.
                mbarrier.wait(free.index((place + 1) % STAGES), ((place + 1) // STAGES & 1) ^ 1)
                copy_rows(v_base, key, v_n, d, v_s.index(slot), WIDE)
            for step in range(clear, steps):
                # One key per thread, then all of them where the copies need them.
                flat_key, seen = masked_keys(step, flat_lane, span, ends, window, listed, BN)
                place = ring + step
                slot = place % STAGES
                keys_s.store(flat_key)
                key = keys_s.load(gl.SliceLayout(1, LINE))
                copy_rows(k_base, key, k_n, d, k_s.index(slot), WIDE)
                async_copy.mbarrier_arrive(full.index(slot), increment_count=False)
                ranges.index(slot).store(seen)
                mbarrier.arrive(masked.index((turn + step - clear) % STAGES), count=1)
                mbarrier.wait(free.index((place + 1) % STAGES), ((place + 1) // STAGES & 1) ^ 1)
                copy_rows(v_base, key, v_n, d, v_s.index(slot), WIDE)
            ring += steps
            turn += steps - clear
            turns += 1
            # The step that copies nothing: it hands over the last V, and waits like any other.
            async_copy.mbarrier_arrive(full.index(ring % STAGES), increment_count=False)
            mbarrier.wait(free.index((ring + 1) % STAGES), ((ring + 1) // STAGES & 1) ^ 1)
            ring += 1


@gluon.jit
def _softmax(raw, top, scale):
    """Weights of one step in base 2, the new maximum, and what the old weights shrink by."""
    new_top = gl.maximum(top, gl.max(raw, 1) * scale)
    return gl.exp2(raw * scale - new_top[:, None]), new_top, gl.exp2(top - new_top)


@gluon.jit
def _step(
    place, turn, q, weights, acc, top, total, t, blank, scale,
    k_s, v_s, ranges, full, masked, free,
    BN: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr,
    WEIGHTS: gl.constexpr, OUTPUT: gl.constexpr, COLUMN: gl.constexpr,
):  # fmt: skip
    """Logits and softmax of step i, while the weights of step i - 1 meet their values."""
    slot = place % STAGES
    mbarrier.wait(full.index(slot), place // STAGES & 1)
    fence_async_shared()
    raw = warpgroup_mma(q, k_s.index(slot).permute((1, 0)), blank, use_acc=False, is_async=True)
    product = warpgroup_mma(weights, v_s.index((place - 1) % STAGES), acc, is_async=True)
    raw = warpgroup_mma_wait(1, deps=[raw])
    if MASKED:
        mbarrier.wait(masked.index(turn % STAGES), turn // STAGES & 1)
        raw = gl.where(within(ranges.index(slot), t, COLUMN), raw, -float("inf"))
    shrink = top
    sums = total
    # Always taken (`scale` is positive). Without a branch the compiler waits for the product first.
    if scale > 0:
        raw, top, shrink = _softmax(raw, top, scale)
        sums = thread_sums(raw, BN)
    acc, raw = warpgroup_mma_wait(0, deps=[product, raw])
    mbarrier.arrive(free.index(slot), count=1)
    total = total * gl.convert_layout(shrink, gl.SliceLayout(1, total.type.layout))[:, None] + sums
    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, OUTPUT))[:, None]
    return gl.convert_layout(raw.to(k_s.dtype), WEIGHTS), acc, top, total


@gluon.jit
def _compute(
    out_ptr, lse_ptr, places, lines, shape, columns, window, scale, first, count, stride,
    first_row, q_s, k_s, v_s, ranges, full, masked, free, q_full, q_free,
    SIZE: gl.constexpr, BQ: gl.constexpr, HG: gl.constexpr, BN: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr, REGULAR: gl.constexpr,
):  # fmt: skip
    """out and lse of rows first_row .. first_row + 64 of every tile."""
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, LOGITS)
    COLUMN: gl.constexpr = gl.SliceLayout(0, LOGITS)
    o_b, o_h, o_n = places
    heads, group, queries, row_keys = shape
    item_m = first_row + gl.arange(0, HALF, layout=ROW)
    t = item_m // HG  # place of the query in the tile
    item_o = first_row + gl.arange(0, HALF, layout=gl.SliceLayout(1, OUTPUT))
    d = gl.arange(0, D, layout=gl.SliceLayout(0, OUTPUT))
    blank = gl.zeros([HALF, BN], gl.float32, layout=LOGITS)
    ring = first * 0  # steps before this tile's
    turn = ring  # those of them with masks
    turns = ring  # tiles
    exists, batch, q_head, query, rows, clear, steps = rows_of(
        first, lines, shape, columns, window, SIZE, BQ, HG, BN, REGULAR
    )
    for index in range(first, count, stride):
        # Of the next tile already: what is read here is not needed before the end of this one.
        # What a loop carries must be used outside the bounds of inner loops, or Triton drops it.
        exists_1, batch_1, q_head_1, query_1, rows_1, clear_1, steps_1 = rows_of(
            index + stride, lines, shape, columns, window, SIZE, BQ, HG, BN, REGULAR
        )
        if exists:
            acc = gl.zeros([HALF, D], gl.float32, layout=OUTPUT)
            top = gl.full([HALF], -1.0e30, gl.float32, layout=ROW)
            slot = ring % STAGES
            mbarrier.wait(q_full, turns & 1)
            mbarrier.wait(full.index(slot), ring // STAGES & 1)
            fence_async_shared()
            raw = warpgroup_mma(
                q_s, k_s.index(slot).permute((1, 0)), blank, use_acc=False, is_async=True
            )
            raw = warpgroup_mma_wait(0, deps=[raw])
            if clear == 0:
                mbarrier.wait(masked.index(turn % STAGES), turn // STAGES & 1)
                raw = gl.where(within(ranges.index(slot), t, COLUMN), raw, -float("inf"))
            mbarrier.arrive(free.index(slot), count=1)
            weights_32, top, shrink = _softmax(raw, top, scale)
            total = thread_sums(weights_32, BN)
            weights = gl.convert_layout(weights_32.to(k_s.dtype), WEIGHTS)
            for step in range(1, clear):
                weights, acc, top, total = _step(
                    ring + step, turn, q_s, weights, acc, top, total, t, blank, scale,
                    k_s, v_s, ranges, full, masked, free,
                    BN, STAGES, False, WEIGHTS, OUTPUT, COLUMN,
                )  # fmt: skip
            for step in range(gl.maximum(clear, 1), steps):
                weights, acc, top, total = _step(
                    ring + step, turn + step - clear, q_s, weights, acc, top, total, t, blank,
                    scale, k_s, v_s, ranges, full, masked, free,
                    BN, STAGES, True, WEIGHTS, OUTPUT, COLUMN,
                )  # fmt: skip
            mbarrier.arrive(q_free, count=1)
            ring += steps
            turn += steps - clear
            turns += 1
            mbarrier.wait(full.index(ring % STAGES), ring // STAGES & 1)
            fence_async_shared()
            acc = warpgroup_mma(weights, v_s.index((ring - 1) % STAGES), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(free.index(ring % STAGES), count=1)
            ring += 1

            row_total = gl.convert_layout(gl.sum(total, 1), ROW)
            row_total = gl.where(t < rows, row_total, 1.0)
            acc = acc * gl.convert_layout(1.0 / row_total, gl.SliceLayout(1, OUTPUT))[:, None]
            stat = (batch * heads * group + q_head + item_m % HG) * queries + query + t
            gl.store(lse_ptr + stat, top + gl.log2(row_total), mask=t < rows)
            at = (query + item_o // HG).to(gl.int64) * o_n + (q_head + item_o % HG).to(
                gl.int64
            ) * o_h
            gl.store(
                (out_ptr + batch * o_b + at)[:, None] + d[None, :],
                acc.to(k_s.dtype),
                mask=gl.expand_dims(item_o // HG < rows, 1),
            )
        exists, batch, q_head, query = exists_1, batch_1, q_head_1, query_1
        rows, clear, steps = rows_1, clear_1, steps_1


@gluon.jit(do_not_specialize=SIZES)
def _attend_hopper(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    end, sequences, tiles, offsets, counts, listed,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_n,
    heads, group, queries, row_keys, columns, window, scale,
    SIZE: gl.constexpr, BQ: gl.constexpr, HG: gl.constexpr, BN: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr, WIDE: gl.constexpr, REGULAR: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    rows_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF, D], dtype)
    keys_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, D], dtype)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_s = gl.allocate_shared_memory(dtype, [2, HALF, D], rows_layout)
    k_s = gl.allocate_shared_memory(dtype, [STAGES, BN, D], keys_layout)
    v_s = gl.allocate_shared_memory(dtype, [STAGES, BN, D], keys_layout)
    ranges = gl.allocate_shared_memory(gl.int32, [STAGES, BN], flat)
    keys_s = gl.allocate_shared_memory(gl.int32, [BN], flat)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    masked = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout()).index(0)
    q_free = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout()).index(0)
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=COPIERS)
        mbarrier.init(masked.index(slot), count=1)
        mbarrier.init(free.index(slot), count=2)
    mbarrier.init(q_full, count=COPIERS)
    mbarrier.init(q_free, count=2)

    lines = (sequences, tiles, offsets, counts, listed)
    shape = (heads, group, queries, row_keys)
    first = gl.program_id(0)
    stride = gl.num_programs(0)
    count = columns * heads * (group // HG)
    gl.warp_specialize(
        [
            (_compute, (
                out_ptr, lse_ptr, (o_b, o_h, o_n), lines, shape, columns, window, scale,
                first, count, stride, 0, q_s.index(0), k_s, v_s, ranges, full, masked, free,
                q_full, q_free, SIZE, BQ, HG, BN, D, STAGES, REGULAR,
            )),
            (_compute, (
                out_ptr, lse_ptr, (o_b, o_h, o_n), lines, shape, columns, window, scale,
                first, count, stride, HALF, q_s.index(1), k_s, v_s, ranges, full, masked, free,
                q_full, q_free, SIZE, BQ, HG, BN, D, STAGES, REGULAR,
            )),
            (_copy, (
                (q_ptr, k_ptr, v_ptr), (q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n),
                lines, shape, columns, window, end, first, count, stride,
                q_s, k_s, v_s, ranges, keys_s, full, masked, free, q_full, q_free,
                SIZE, BQ, HG, BN, D, STAGES, WIDE, REGULAR,
            )),
        ],
        [4, 4],
        [208, 88],
    )  # fmt: skip


def attend_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    end: torch.Tensor,
    lists: KeyLists,
    geometry: Geometry,
    *,
    window: int,
    scale: float,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [B, H, N, D] and lse float32 [B, H, N] in base 2, as `forward.attend_forward`."""
    if out is None:
        out = empty_rows(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    group, packed_heads = geometry.group, heads_of_tile(geometry.group)
    bq = ROWS // packed_heads
    columns = lists.tiles.shape[0] * (lists.size // bq)
    tiles = columns * geometry.heads * (group // packed_heads)
    launch(
        _attend_hopper, (programs(tiles, q.device),),
        q, k, v, out, lse,
        end, geometry.sequences, lists.tiles, lists.offsets, lists.counts, lists.keys,
        *strides(q), *strides(k), *strides(v), *strides(out),
        geometry.heads, group, geometry.queries, geometry.keys, columns, window,
        scale * LOG2_E,
        SIZE=lists.size, BQ=bq, HG=packed_heads, BN=KEYS, D=q.shape[3], STAGES=STAGES,
        WIDE=needs_wide_index(k, v), REGULAR=geometry.regular, num_warps=4,
    )  # fmt: skip
    return out, lse
