"""The gradient of the queries on Hopper: some warps copy, some compute, as in `forward`.

What `triton/backward/query_gradient.py` computes for the gate `straight_through`. A consumer issues
both products of the next keys (logits, and do v^T) and the product of the last weight gradients
together, and takes the softmax gradient meanwhile.
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
    in_tile,
    items,
    masked_keys,
    rows_at,
    sequence_of,
    span_of,
    thread_sums,
    within,
)
from sparsek_kernels.triton.launches.launch import launch
from sparsek_kernels.triton.lists import KeyLists
from sparsek_kernels.triton.tiles import LOG2_E, empty_rows, needs_wide_index, strides

KEYS, STAGES = 64, 4  # per step, steps in the ring: what shared memory holds
_LN_2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def _copy(
    k_base, v_base, k_n, v_n, k_s, v_s, ranges, interiors, shares, keys_s, full, free,
    end, run_start, run_stop, window, span, listed,
    BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, WIDE: gl.constexpr,
    SCORES: gl.constexpr,
):  # fmt: skip
    """Copies K and V of every step, and who sees each key."""
    LINE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    lane = gl.arange(0, BN, layout=gl.BlockedLayout([1], [32], [4], [0]))
    d = gl.arange(0, D, layout=gl.SliceLayout(0, LINE))
    clear, steps = items(span, BN)
    for step in range(steps):
        slot = step % STAGES
        flat_key, seen = masked_keys(step, lane, span, end, window, listed, BN)
        keys_s.store(flat_key)
        key = keys_s.load(gl.SliceLayout(1, LINE))
        # Step i frees V of step i and K of step i - 1.
        copy_rows(v_base, key, v_n, d, v_s.index(slot), WIDE)
        if SCORES:
            # Window and sinks are never interior; nor is what stands behind the last item.
            item = step * BN + lane - span.near
            is_selected = (item >= 0) & (item < span.front + span.back)
            first = gl.load(run_start + flat_key, mask=is_selected, other=0)
            stop = gl.load(run_stop + flat_key, mask=is_selected, other=0)
            interiors.index(slot).store(in_tile(first, stop, span.t0, span.t1))
            shares.index(slot).store(gl.where((first <= span.t0) & (stop >= span.t1), 1.0, 0.0))
        ranges.index(slot).store(seen)
        mbarrier.wait(free.index((step + 1) % STAGES), ((step + 1) // STAGES & 1) ^ 1)
        copy_rows(k_base, key, k_n, d, k_s.index(slot), WIDE)
        async_copy.mbarrier_arrive(full.index(slot), increment_count=False)
        mbarrier.arrive(full.index(slot), count=1)


@gluon.jit
def _weight_gradients(raw, weighted, lse, delta, scale):
    return gl.exp2(raw * scale - lse[:, None]) * (weighted - delta[:, None])


@gluon.jit
def _step(
    step, q, do, last, acc, row_sums, lse, delta, t, blank, scale,
    k_s, v_s, ranges, interiors, shares, full, free,
    BN: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr, SCORES: gl.constexpr,
    WEIGHTS: gl.constexpr, COLUMN: gl.constexpr,
):  # fmt: skip
    """Weight gradients of step i, while those of step i - 1 meet their keys."""
    slot = step % STAGES
    mbarrier.wait(full.index(slot), step // STAGES & 1)
    fence_async_shared()
    raw = warpgroup_mma(q, k_s.index(slot).permute((1, 0)), blank, use_acc=False, is_async=True)
    weighted = warpgroup_mma(
        do, v_s.index(slot).permute((1, 0)), blank, use_acc=False, is_async=True
    )
    product = warpgroup_mma(last, k_s.index((step - 1) % STAGES), acc, is_async=True)
    raw, weighted = warpgroup_mma_wait(1, deps=[raw, weighted])
    if MASKED:
        raw = gl.where(within(ranges.index(slot), t, COLUMN), raw, -float("inf"))
    # Always taken (`scale` is positive). Without a branch the compiler waits for the product first.
    if scale > 0:
        raw = _weight_gradients(raw, weighted, lse, delta, scale)
        if SCORES:
            # Keys that all queries see are interior for all of them or for none.
            if MASKED:
                counted = gl.where(within(interiors.index(slot), t, COLUMN), raw, 0.0)
            else:
                counted = raw * shares.index(slot).load(COLUMN)[None, :]
            row_sums += thread_sums(counted, BN)
    acc, raw = warpgroup_mma_wait(0, deps=[product, raw])
    mbarrier.arrive(free.index(slot), count=1)
    return gl.convert_layout(raw.to(k_s.dtype), WEIGHTS), acc, row_sums


@gluon.jit
def _compute(
    dq_base, lse_base, delta_base, sum_base, q_s, do_s, k_s, v_s, ranges, interiors, shares, full,
    free, o_h, o_n, queries, scale, first_query, first_head, first_row, span,
    HG: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    SCORES: gl.constexpr,
):  # fmt: skip
    """dq and the row sums of rows first_row .. first_row + 64."""
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, LOGITS)
    COLUMN: gl.constexpr = gl.SliceLayout(0, LOGITS)
    clear, steps = items(span, BN)
    count = span.t1 - span.t0
    item = first_row + gl.arange(0, HALF, layout=ROW)
    t = item // HG  # place of the query in the tile
    inside = t < count
    query = (first_query + t).to(gl.int64)
    head = (first_head + item % HG).to(gl.int64)
    stat = head * queries + query
    lse = gl.load(lse_base + stat, mask=inside, other=float("inf"))
    delta = gl.load(delta_base + stat, mask=inside, other=0.0)
    blank = gl.zeros([HALF, BN], gl.float32, layout=LOGITS)
    acc = gl.zeros([HALF, D], gl.float32, layout=OUTPUT)

    mbarrier.wait(full.index(0), 0)
    fence_async_shared()
    raw = warpgroup_mma(q_s, k_s.index(0).permute((1, 0)), blank, use_acc=False, is_async=True)
    weighted = warpgroup_mma(
        do_s, v_s.index(0).permute((1, 0)), blank, use_acc=False, is_async=True
    )
    raw, weighted = warpgroup_mma_wait(0, deps=[raw, weighted])
    raw = gl.where(within(ranges.index(0), t, COLUMN), raw, -float("inf"))
    raw = _weight_gradients(raw, weighted, lse, delta, scale)
    counted = raw
    if SCORES:
        counted = gl.where(within(interiors.index(0), t, COLUMN), raw, 0.0)
    row_sums = thread_sums(counted, BN)
    mbarrier.arrive(free.index(0), count=1)
    last = gl.convert_layout(raw.to(k_s.dtype), WEIGHTS)
    # The window comes first, and nothing in it is interior.
    scored = gl.minimum(gl.maximum(span.near // BN, 1), clear)
    for step in range(1, scored):
        last, acc, row_sums = _step(
            step, q_s, do_s, last, acc, row_sums, lse, delta, t, blank, scale,
            k_s, v_s, ranges, interiors, shares, full, free,
            BN, STAGES, False, False, WEIGHTS, COLUMN,
        )  # fmt: skip
    for step in range(gl.maximum(scored, 1), clear):
        last, acc, row_sums = _step(
            step, q_s, do_s, last, acc, row_sums, lse, delta, t, blank, scale,
            k_s, v_s, ranges, interiors, shares, full, free,
            BN, STAGES, False, SCORES, WEIGHTS, COLUMN,
        )  # fmt: skip
    for step in range(gl.maximum(clear, 1), steps):
        last, acc, row_sums = _step(
            step, q_s, do_s, last, acc, row_sums, lse, delta, t, blank, scale,
            k_s, v_s, ranges, interiors, shares, full, free,
            BN, STAGES, True, SCORES, WEIGHTS, COLUMN,
        )  # fmt: skip
    acc = warpgroup_mma(last, k_s.index((steps - 1) % STAGES), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])

    if SCORES:
        row_sum = gl.convert_layout(gl.sum(row_sums, 1), ROW)
        gl.store(sum_base + stat, row_sum, mask=inside)
    q_s.store((acc * (scale * _LN_2)).to(k_s.dtype))
    at, exists = rows_at(dq_base, first_query, first_head, first_row, count, o_n, o_h, HG, D)
    gl.store(at, q_s.load(at.type.layout), mask=exists)


@gluon.jit(do_not_specialize=SIZES)
def _query_gradient_hopper(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, row_sum_ptr,
    run_start, run_stop, end, sequences, tiles, offsets, counts, listed,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_n, do_b, do_h, do_n,
    heads, group, queries, row_keys, window, scale,
    SIZE: gl.constexpr, BQ: gl.constexpr, HG: gl.constexpr, BN: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr, WIDE: gl.constexpr, REGULAR: gl.constexpr, SCORES: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    tile = gl.program_id(0) // (SIZE // BQ)
    exists, place, its = sequence_of(tile, sequences, tiles, queries, row_keys, SIZE, REGULAR)
    batch = its.batch
    local = place * SIZE + (gl.program_id(0) % (SIZE // BQ)) * BQ
    if (exists == 0) | (local >= its.queries):
        return
    head = gl.program_id(1) // (group // HG)
    part = gl.program_id(1) % (group // HG)
    last = its.first_key + its.keys
    t0 = last - its.queries + local
    t1 = gl.minimum(t0 + BQ, last)
    query = its.first_query + local
    q_head = head * group + part * HG

    rows_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF, D], dtype)
    keys_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, D], dtype)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_s = gl.allocate_shared_memory(dtype, [2, HALF, D], rows_layout)
    do_s = gl.allocate_shared_memory(dtype, [2, HALF, D], rows_layout)
    for half in gl.static_range(2):
        at, inside = rows_at(q_ptr + batch * q_b, query, q_head, half * HALF, t1 - t0, q_n, q_h,
                              HG, D)  # fmt: skip
        async_copy.async_copy_global_to_shared(q_s.index(half), at, mask=inside)
        at, inside = rows_at(do_ptr + batch * do_b, query, q_head, half * HALF, t1 - t0, do_n,
                              do_h, HG, D)  # fmt: skip
        async_copy.async_copy_global_to_shared(do_s.index(half), at, mask=inside)
    async_copy.commit_group()
    span, own = span_of(
        tile, head, heads, t0, t1, its.window_first, window, offsets, counts, listed
    )
    k_s = gl.allocate_shared_memory(dtype, [STAGES, BN, D], keys_layout)
    v_s = gl.allocate_shared_memory(dtype, [STAGES, BN, D], keys_layout)
    ranges = gl.allocate_shared_memory(gl.int32, [STAGES, BN], flat)
    interiors = gl.allocate_shared_memory(gl.int32, [STAGES, BN], flat)
    shares = gl.allocate_shared_memory(gl.float32, [STAGES, BN], flat)
    keys_s = gl.allocate_shared_memory(gl.int32, [BN], flat)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=COPIERS + 1)
        mbarrier.init(free.index(slot), count=2)

    row = batch * heads + head
    stat = batch * heads * group * queries
    dq_base = dq_ptr + batch * o_b
    async_copy.wait_group(0)
    gl.warp_specialize(
        [
            (_compute, (
                dq_base, lse_ptr + stat, delta_ptr + stat, row_sum_ptr + stat,
                q_s.index(0), do_s.index(0), k_s, v_s, ranges, interiors, shares, full, free,
                o_h, o_n, queries, scale, query, q_head, 0, span, HG, BN, D, STAGES, SCORES,
            )),
            (_compute, (
                dq_base, lse_ptr + stat, delta_ptr + stat, row_sum_ptr + stat,
                q_s.index(1), do_s.index(1), k_s, v_s, ranges, interiors, shares, full, free,
                o_h, o_n, queries, scale, query, q_head, HALF, span, HG, BN, D, STAGES, SCORES,
            )),
            (_copy, (
                k_ptr + batch * k_b + head.to(gl.int64) * k_h,
                v_ptr + batch * v_b + head.to(gl.int64) * v_h,
                k_n, v_n, k_s, v_s, ranges, interiors, shares, keys_s, full, free,
                end + row * row_keys, run_start + row * row_keys, run_stop + row * row_keys,
                window, span, own, BN, D, STAGES, WIDE, SCORES,
            )),
        ],
        [4, 4],
        [216, 72],
    )  # fmt: skip


def query_gradient(
    q, k, v, do, lse, delta, end, lists: KeyLists, geometry: Geometry, *,
    window: int, scale: float, runs,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """dq [B, H, N, D] and, if `runs` is given, float32 [B, H, N]: as `forward.query_gradient`."""
    dq = empty_rows(q)
    row_sum = None if runs is None else torch.empty_like(lse)
    run_start, run_stop = runs or (end, end)
    group, packed_heads = geometry.group, heads_of_tile(geometry.group)
    bq = ROWS // packed_heads
    grid = (lists.tiles.shape[0] * (lists.size // bq), geometry.heads * (group // packed_heads))
    launch(
        _query_gradient_hopper, grid,
        q, k, v, do, lse, delta, dq, lse if row_sum is None else row_sum,
        run_start, run_stop,
        end, geometry.sequences, lists.tiles, lists.offsets, lists.counts, lists.keys,
        *strides(q), *strides(k), *strides(v), *strides(dq), *strides(do),
        geometry.heads, group, geometry.queries, geometry.keys, window, scale * LOG2_E,
        SIZE=lists.size, BQ=bq, HG=packed_heads, BN=KEYS, D=q.shape[3], STAGES=STAGES,
        WIDE=needs_wide_index(k, v), REGULAR=geometry.regular, SCORES=runs is not None,
        num_warps=4,
    )  # fmt: skip
    return dq, row_sum
