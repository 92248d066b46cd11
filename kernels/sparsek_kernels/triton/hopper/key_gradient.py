"""The gradient of keys and values on Hopper: some warps copy queries, some compute.

What `backward._key_gradient` computes for the gate `straight_through`, in the same two launches: a
program owns 128 keys, neighbours in the first launch and from a super tile's list in the second.
Each of its two computing warpgroups keeps dK and dV of 64 keys in registers, and walks the blocks
of 64 queries that matter, one head of the group after the other.
"""

import torch
import triton
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
from sparsek_kernels.triton.hopper.query_blocks import (
    BLOCK,
    block_of,
    blocks_of,
    copy_queries,
    key_of,
)
from sparsek_kernels.triton.hopper.tiles import (
    COPIERS,
    HALF,
    SIZES,
    copy_rows,
    sequence_at,
    thread_sums,
)
from sparsek_kernels.triton.launches.launch import launch
from sparsek_kernels.triton.lists import KeyLists
from sparsek_kernels.triton.tiles import LOG2_E, needs_wide_index, strides

KEYS, STAGES = 128, 3  # of a program, steps in the ring
_LN_2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def _step(
    step, t, k_s, v_s, dk, dv, sums, begin, stop, run_low, run_high, blank, scale,
    q_s, do_s, lse_s, delta_s, full, free,
    STAGES: gl.constexpr, MASKED: gl.constexpr, SCORES: gl.constexpr,
    WEIGHTS: gl.constexpr, COLUMN: gl.constexpr,
):  # fmt: skip
    """Adds one block of queries, of one head, to dK and dV."""
    slot = step % STAGES
    mbarrier.wait(full.index(slot), step // STAGES & 1)
    fence_async_shared()
    q = q_s.index(slot)
    do = do_s.index(slot)
    raw = warpgroup_mma(k_s, q.permute((1, 0)), blank, use_acc=False, is_async=True)
    weighted = warpgroup_mma(v_s, do.permute((1, 0)), blank, use_acc=False, is_async=True)
    lse = lse_s.index(slot).load(COLUMN)
    raw = warpgroup_mma_wait(1, deps=[raw])
    weights = gl.exp2(raw * scale - lse[None, :])
    if MASKED:
        visible = (t[None, :] >= begin[:, None]) & (t[None, :] < stop[:, None])
        weights = gl.where(visible, weights, 0.0)
    dv = warpgroup_mma(gl.convert_layout(weights.to(q.dtype), WEIGHTS), do, dv, is_async=True)
    delta = delta_s.index(slot).load(COLUMN)
    weighted = warpgroup_mma_wait(1, deps=[weighted])
    ds = weights * (weighted - delta[None, :])
    if SCORES:
        counted = ds
        if MASKED:
            interior = (t[None, :] >= run_low[:, None]) & (t[None, :] < run_high[:, None])
            counted = gl.where(interior, ds, 0.0)
        sums += thread_sums(counted, BLOCK)
    dk = warpgroup_mma(gl.convert_layout(ds.to(q.dtype), WEIGHTS), q, dk, is_async=True)
    dk, dv = warpgroup_mma_wait(0, deps=[dk, dv])
    mbarrier.arrive(free.index(slot), count=1)
    return dk, dv, sums


@gluon.jit
def _add_up(
    keys, sums_at, rows, ring, span, first_item, GROUP: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr, SCORES: gl.constexpr, WINDOW: gl.constexpr, ATOMIC: gl.constexpr,
):  # fmt: skip
    """dK, dV and the key sums of 64 keys."""
    keys_at, ends_at, run_start, run_stop = keys
    dk_base, dv_base, sum_base = sums_at
    k_s, v_s = rows
    q_s, do_s, lse_s, delta_s, full, free = ring
    blocks, scale, window, t0, count, fallback, items = span
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, LOGITS)
    COLUMN: gl.constexpr = gl.SliceLayout(0, LOGITS)
    low, clear_low, clear_high, high = blocks
    item = first_item + gl.arange(0, HALF, layout=ROW)
    key, exists, begin, stop = key_of(item, items, keys_at, ends_at, window, fallback, WINDOW)
    begin -= t0
    stop -= t0
    run_low = begin
    run_high = begin
    if SCORES:
        run_low = gl.load(run_start + key, mask=exists, other=0) - t0
        run_high = gl.load(run_stop + key, mask=exists, other=0) - t0
    blank = gl.zeros([HALF, BLOCK], gl.float32, layout=LOGITS)
    dk = gl.zeros([HALF, D], gl.float32, layout=OUTPUT)
    dv = gl.zeros([HALF, D], gl.float32, layout=OUTPUT)
    sums = thread_sums(blank, BLOCK)
    lane = gl.arange(0, BLOCK, layout=COLUMN)
    clear = (clear_high - clear_low) * GROUP
    for step in range(clear):
        t = block_of(step, blocks, GROUP) * BLOCK + lane
        dk, dv, sums = _step(
            step, t, k_s, v_s, dk, dv, sums, begin, stop, run_low, run_high, blank, scale,
            q_s, do_s, lse_s, delta_s, full, free, STAGES, False, SCORES, WEIGHTS, COLUMN,
        )  # fmt: skip
    if SCORES:
        # Where blocks without masks exist, a key is interior for all of the tile or for none of it.
        is_interior = (run_low <= 0) & (run_high >= count)
        share = gl.where(is_interior, 1.0, 0.0)
        sums = sums * gl.convert_layout(share, gl.SliceLayout(1, sums.type.layout))[:, None]
    for step in range(clear, (high - low) * GROUP):
        t = block_of(step, blocks, GROUP) * BLOCK + lane
        dk, dv, sums = _step(
            step, t, k_s, v_s, dk, dv, sums, begin, stop, run_low, run_high, blank, scale,
            q_s, do_s, lse_s, delta_s, full, free, STAGES, True, SCORES, WEIGHTS, COLUMN,
        )  # fmt: skip
    dk = dk * (scale * _LN_2)
    item = first_item + gl.arange(0, HALF, layout=gl.SliceLayout(1, OUTPUT))
    at_key, present, _, _ = key_of(item, items, keys_at, ends_at, window, fallback, WINDOW)
    d = gl.arange(0, D, layout=gl.SliceLayout(0, OUTPUT))
    at = (at_key.to(gl.int64) * D)[:, None] + d[None, :]
    mask = gl.expand_dims(present, 1)
    if WINDOW:
        gl.store(dk_base + at, dk, mask=mask)
        gl.store(dv_base + at, dv, mask=mask)
    else:
        if ATOMIC:
            gl.atomic_add(dk_base + at, dk, mask=mask, sem="relaxed")
            gl.atomic_add(dv_base + at, dv, mask=mask, sem="relaxed")
        else:
            gl.store(dk_base + at, dk + gl.load(dk_base + at, mask=mask, other=0.0), mask=mask)
            gl.store(dv_base + at, dv + gl.load(dv_base + at, mask=mask, other=0.0), mask=mask)
        if SCORES:
            total = gl.convert_layout(gl.sum(sums, 1), ROW)
            if ATOMIC:
                gl.atomic_add(sum_base + key, total, mask=exists, sem="relaxed")
            else:
                total += gl.load(sum_base + key, mask=exists, other=0.0)
                gl.store(sum_base + key, total, mask=exists)


@gluon.jit
def _compute(
    keys, sums_at, rows, ring, span, first_item, GROUP: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr, SCORES: gl.constexpr, WINDOW: gl.constexpr, ATOMIC: gl.constexpr,
):  # fmt: skip
    """What one half of the program's keys needs; without keys, only to keep the ring going.

    Args:
        keys: addresses of the listed keys, of their ends, and of their interior runs.
        sums_at: addresses of dK, dV and the key sums.
        rows: K and V of this half. ring: blocks of Q and dO, their statistics, the barriers.
        span: blocks of queries, scale, window, first query and number, fallback key, items.
        first_item: of this half.
    """
    q_s, do_s, lse_s, delta_s, full, free = ring
    blocks, scale, window, t0, count, fallback, items = span
    low, clear_low, clear_high, high = blocks
    front, back, room, limit = items
    if first_item < limit:
        _add_up(
            keys, sums_at, rows, ring, span, first_item,
            GROUP, D, STAGES, SCORES, WINDOW, ATOMIC,
        )  # fmt: skip
    else:
        for step in range((high - low) * GROUP):
            mbarrier.wait(full.index(step % STAGES), step // STAGES & 1)
            mbarrier.arrive(free.index(step % STAGES), count=1)


@gluon.jit(do_not_specialize=SIZES)
def _key_gradient_hopper(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, column_ptr,
    run_start, run_stop, end, sequences, tiles, offsets, counts, listed,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, do_b, do_h, do_n,
    heads, queries, row_keys, window, scale, first_tile, tile_step,
    GROUP: gl.constexpr, SIZE: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    WIDE: gl.constexpr, WINDOW: gl.constexpr, SCORES: gl.constexpr, ATOMIC: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    BN: gl.constexpr = 128
    if WINDOW:
        tile = gl.program_id(0)
        part = 0
        head = gl.program_id(1)
    else:
        tile = first_tile + gl.program_id(1) * tile_step
        part = gl.program_id(0)
        head = gl.program_id(2)
    sequence = gl.load(tiles + 2 * tile)
    if sequence < 0:
        return
    place = gl.load(tiles + 2 * tile + 1)
    its = sequence_at(sequences, sequence)
    batch = its.batch
    first_key = its.first_key
    last = first_key + its.keys
    shift = last - its.queries
    row = batch * heads + head
    keys_at = listed
    fallback = first_key
    if WINDOW:
        fallback = first_key + place * BN
        present = gl.minimum(last - fallback, BN)
        items = (present, 0, 0, present)
        first_item = 0
        t0 = gl.maximum(fallback, shift)
        t1 = gl.minimum(fallback + BN - 1 + window, last)
    else:
        one = tile * heads + head
        front = gl.load(counts + 2 * one)
        back = gl.load(counts + 2 * one + 1)
        # Front and back of the list do not share a program: only keys at the front are interior
        # for all of the tile or for none of it.
        parts = (front + BN - 1) // BN
        first_item = gl.where(part < parts, part * BN, front + (part - parts) * BN)
        limit = gl.where(part < parts, front, front + back)
        if first_item >= limit:
            return
        base = gl.load(offsets + one)
        items = (front, back, (gl.load(offsets + one + 1) - base).to(gl.int32), limit)
        keys_at = listed + base
        t0 = shift + place * SIZE
        t1 = gl.minimum(t0 + SIZE, last)
    ends_at = end + row * row_keys

    blocks = blocks_of(
        first_item, items, keys_at, ends_at, window, fallback, t0, t1, BN, WINDOW, SCORES
    )

    rows_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF, D], dtype)
    one_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    k_s = gl.allocate_shared_memory(dtype, [2, HALF, D], rows_layout)
    v_s = gl.allocate_shared_memory(dtype, [2, HALF, D], rows_layout)
    q_s = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, D], rows_layout)
    do_s = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, D], rows_layout)
    lse_s = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK], one_layout)
    delta_s = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK], one_layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=COPIERS + 1)
        mbarrier.init(free.index(slot), count=2)
    LINE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    d = gl.arange(0, D, layout=gl.SliceLayout(0, LINE))
    for half in gl.static_range(2):
        row_item = first_item + half * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(1, LINE))
        row_key, _, _, _ = key_of(row_item, items, keys_at, ends_at, window, fallback, WINDOW)
        k_base = k_ptr + batch * k_b + head.to(gl.int64) * k_h
        v_base = v_ptr + batch * v_b + head.to(gl.int64) * v_h
        copy_rows(k_base, row_key, k_n, d, k_s.index(half), WIDE)
        copy_rows(v_base, row_key, v_n, d, v_s.index(half), WIDE)
    async_copy.commit_group()

    q0 = (its.first_query + t0 - shift).to(gl.int64)
    q_head = (head * GROUP).to(gl.int64)
    stat = (batch * heads * GROUP + q_head) * queries + q0
    # Adding to a 64-bit zero widens arguments that may be compile-time constants.
    zero = batch * 0
    row_at = row * row_keys
    keys = (keys_at, ends_at, run_start + row_at, run_stop + row_at)
    sums_at = (dk_ptr + row_at * D, dv_ptr + row_at * D, column_ptr + row_at)
    ring = (q_s, do_s, lse_s, delta_s, full, free)
    span = (blocks, scale, window, t0, t1 - t0, fallback, items)
    async_copy.wait_group(0)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_compute, (
                keys, sums_at, (k_s.index(0), v_s.index(0)), ring, span, first_item,
                GROUP, D, STAGES, SCORES, WINDOW, ATOMIC,
            )),
            (_compute, (
                keys, sums_at, (k_s.index(1), v_s.index(1)), ring, span, first_item + HALF,
                GROUP, D, STAGES, SCORES, WINDOW, ATOMIC,
            )),
            (copy_queries, (
                q_ptr + batch * q_b + q_head * q_h + q0 * q_n,
                do_ptr + batch * do_b + q_head * do_h + q0 * do_n,
                lse_ptr + stat, delta_ptr + stat, zero + q_h, q_n, zero + do_h, do_n,
                zero + queries, q_s, do_s, lse_s, delta_s, full, free,
                blocks, t1 - t0, GROUP, D, STAGES,
            )),
        ],
        [4, 4],
        [232, 40],
    )  # fmt: skip


def key_gradient(
    q, k, v, do, lse, delta, end, lists: KeyLists, geometry: Geometry, *,
    window: int, scale: float, runs, deterministic: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """dk, dv float32 [B, G, M, D] and the key sums of dm: as `backward.key_gradient`."""
    dk = torch.empty(k.shape, dtype=torch.float32, device=k.device)
    dv = torch.empty(v.shape, dtype=torch.float32, device=k.device)
    sums = None
    if runs is not None:
        sums = torch.zeros(k.shape[:3], dtype=torch.float32, device=k.device)
    run_start, run_stop = runs or (end, end)

    def add(grid, tiles, is_window, first_tile=0, tile_step=1):
        launch(
            _key_gradient_hopper, grid,
            q, k, v, do, lse, delta, dk, dv, lse if sums is None else sums,
            run_start, run_stop,
            end, geometry.sequences, tiles, lists.offsets, lists.counts, lists.keys,
            *strides(q), *strides(k), *strides(v), *strides(do),
            geometry.heads, geometry.queries, geometry.keys, window,
            scale * LOG2_E, first_tile, tile_step,
            GROUP=geometry.group, SIZE=lists.size, D=q.shape[3], STAGES=STAGES,
            WIDE=needs_wide_index(k, v), WINDOW=is_window,
            SCORES=runs is not None and not is_window, ATOMIC=not deterministic, num_warps=4,
        )  # fmt: skip

    tiles = geometry.tiles(KEYS)
    add((tiles.shape[0], geometry.heads), tiles, True)
    # One more, because front and back of a list are split apart.
    parts = triton.cdiv(lists.capacity, KEYS) + 1 if lists.capacity else 0
    count = lists.tiles.shape[0]
    if parts and deterministic:
        # Batch items share no key, so their super tiles of one place may run together.
        together = 1 if geometry.packed else geometry.batch
        step = count // together
        for place in range(step):
            add((parts, together, geometry.heads), lists.tiles, False, place, step)
    elif parts:
        add((parts, count, geometry.heads), lists.tiles, False)
    return dk, dv, sums
