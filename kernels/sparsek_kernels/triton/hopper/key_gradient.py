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

from sparsek_kernels.triton.forward import LOG2_E, needs_wide_index, strides
from sparsek_kernels.triton.geometry import Geometry
from sparsek_kernels.triton.hopper.tiles import COPIERS, HALF, copy_rows, thread_sums
from sparsek_kernels.triton.lists import KeyLists

KEYS, STAGES = 128, 3  # of a program, steps in the ring
_BLOCK = gl.constexpr(64)  # queries of a step
_LN_2 = gl.constexpr(0.6931471805599453)
_FAR = gl.constexpr(2**31 - 1)


@gluon.jit
def _block_of(step, blocks, GROUP: gl.constexpr):
    """Block of queries of a step: blocks without masks first, then both ends."""
    low, clear_low, clear_high, high = blocks
    turn = step // GROUP
    clear = clear_high - clear_low
    after = turn - clear
    ramp = clear_low - low
    hidden = gl.where(after < ramp, low + after, clear_high + after - ramp)
    return gl.where(turn < clear, clear_low + turn, hidden)


@gluon.jit
def _copy(
    q_base, do_base, lse_base, delta_base, q_h, q_n, do_h, do_n, queries,
    q_s, do_s, lse_s, delta_s, full, free, blocks, count,
    GROUP: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copies Q, dO and their statistics, block by block; rows past `count` are zero."""
    LINE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    lane = gl.arange(0, _BLOCK, layout=gl.SliceLayout(1, LINE))
    flat_lane = gl.arange(0, _BLOCK, layout=gl.BlockedLayout([1], [32], [4], [0]))
    d = gl.arange(0, D, layout=gl.SliceLayout(0, LINE))
    low, clear_low, clear_high, high = blocks
    q_offset = (lane * q_n)[:, None] + d[None, :]
    do_offset = (lane * do_n)[:, None] + d[None, :]
    for step in range((high - low) * GROUP):
        slot = step % STAGES
        first = _block_of(step, blocks, GROUP) * _BLOCK
        head = step % GROUP
        place = first + flat_lane
        inside = place < count
        stat = head * queries + place
        lse = gl.load(lse_base + stat, mask=inside, other=float("inf"))
        delta = gl.load(delta_base + stat, mask=inside, other=0.0)
        exists = (lane < count - first)[:, None]
        q_at = q_base + head * q_h + first.to(gl.int64) * q_n + q_offset
        do_at = do_base + head * do_h + first.to(gl.int64) * do_n + do_offset
        mbarrier.wait(free.index(slot), (step // STAGES & 1) ^ 1)
        async_copy.async_copy_global_to_shared(q_s.index(slot), q_at, mask=exists)
        async_copy.async_copy_global_to_shared(do_s.index(slot), do_at, mask=exists)
        async_copy.mbarrier_arrive(full.index(slot), increment_count=False)
        lse_s.index(slot).store(lse)
        delta_s.index(slot).store(delta)
        mbarrier.arrive(full.index(slot), count=1)


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
        sums += thread_sums(counted, _BLOCK)
    dk = warpgroup_mma(gl.convert_layout(ds.to(q.dtype), WEIGHTS), q, dk, is_async=True)
    dk, dv = warpgroup_mma_wait(0, deps=[dk, dv])
    mbarrier.arrive(free.index(slot), count=1)
    return dk, dv, sums


@gluon.jit
def _compute(
    keys_at, ends_at, run_start, run_stop, dk_base, dv_base, sum_base, k_s, v_s,
    q_s, do_s, lse_s, delta_s, full, free, blocks, scale, window, t0, count, fallback, items,
    first_item,
    GROUP: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, SCORES: gl.constexpr,
    WINDOW: gl.constexpr, ATOMIC: gl.constexpr,
):  # fmt: skip
    """dK, dV and the key sums of 64 keys."""
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _BLOCK, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, LOGITS)
    COLUMN: gl.constexpr = gl.SliceLayout(0, LOGITS)
    low, clear_low, clear_high, high = blocks
    item = first_item + gl.arange(0, HALF, layout=ROW)
    key, exists, begin, stop = _key_of(item, items, keys_at, ends_at, window, fallback, WINDOW)
    begin -= t0
    stop -= t0
    run_low = begin
    run_high = begin
    if SCORES:
        run_low = gl.load(run_start + key, mask=exists, other=0) - t0
        run_high = gl.load(run_stop + key, mask=exists, other=0) - t0
    blank = gl.zeros([HALF, _BLOCK], gl.float32, layout=LOGITS)
    dk = gl.zeros([HALF, D], gl.float32, layout=OUTPUT)
    dv = gl.zeros([HALF, D], gl.float32, layout=OUTPUT)
    sums = thread_sums(blank, _BLOCK)
    lane = gl.arange(0, _BLOCK, layout=COLUMN)
    clear = (clear_high - clear_low) * GROUP
    for step in range(clear):
        t = _block_of(step, blocks, GROUP) * _BLOCK + lane
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
        t = _block_of(step, blocks, GROUP) * _BLOCK + lane
        dk, dv, sums = _step(
            step, t, k_s, v_s, dk, dv, sums, begin, stop, run_low, run_high, blank, scale,
            q_s, do_s, lse_s, delta_s, full, free, STAGES, True, SCORES, WEIGHTS, COLUMN,
        )  # fmt: skip
    dk = dk * (scale * _LN_2)
    item = first_item + gl.arange(0, HALF, layout=gl.SliceLayout(1, OUTPUT))
    at_key, present, _, _ = _key_of(item, items, keys_at, ends_at, window, fallback, WINDOW)
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
def _key_of(item, items, keys_at, ends_at, window, fallback, WINDOW: gl.constexpr):
    """Keys of some items, which of them exist, and the queries [begin, stop) that see them."""
    front, back, room = items
    exists = item < front + back
    if WINDOW:
        key = gl.where(exists, fallback + item, fallback)
        begin = key
        stop = gl.where(exists, key + window, 0)
    else:
        at = gl.where(item < front, item, room - back + item - front)
        key = gl.load(keys_at + at, mask=exists, other=0)
        key = gl.where(exists, key, fallback)
        begin = key + window
        stop = gl.load(ends_at + key, mask=exists, other=0)
    return key, exists, begin, stop


@gluon.jit
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
    line = sequences + 6 * sequence
    batch = gl.load(line).to(gl.int64)
    first_query = gl.load(line + 1)
    query_count = gl.load(line + 2)
    first_key = gl.load(line + 3)
    key_count = gl.load(line + 4)
    shift = first_key + key_count - query_count
    last = first_key + key_count
    row = batch * heads + head
    keys_at = listed
    fallback = first_key
    if WINDOW:
        fallback = first_key + place * BN
        items = (gl.minimum(last - fallback, BN), 0, 0)
        t0 = gl.maximum(fallback, shift)
        t1 = gl.minimum(fallback + BN - 1 + window, last)
    else:
        one = tile * heads + head
        front = gl.load(counts + 2 * one)
        back = gl.load(counts + 2 * one + 1)
        if part * BN >= front + back:
            return
        base = gl.load(offsets + one)
        items = (front, back, (gl.load(offsets + one + 1) - base).to(gl.int32))
        keys_at = listed + base
        t0 = shift + place * SIZE
        t1 = gl.minimum(t0 + SIZE, last)
    ends_at = end + row * row_keys
    first_item = part * BN

    # Blocks of queries [low, high) matter at all; in [clear_low, clear_high) nothing is hidden.
    FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    item = first_item + gl.arange(0, BN, layout=FLAT)
    key, exists, begin, stop = _key_of(item, items, keys_at, ends_at, window, fallback, WINDOW)
    any_begin = gl.min(gl.where(exists, begin, _FAR), 0)
    any_stop = gl.max(stop, 0)
    all_begin = gl.max(gl.where(exists, begin, 0), 0)
    all_stop = gl.minimum(gl.min(gl.where(exists, stop, _FAR), 0), t1)
    low = gl.maximum(any_begin - t0, 0) // _BLOCK
    high = (gl.maximum(gl.minimum(any_stop, t1) - t0, 0) + _BLOCK - 1) // _BLOCK
    high = gl.maximum(high, low)
    clear_low = (gl.maximum(all_begin - t0, 0) + _BLOCK - 1) // _BLOCK
    clear_low = gl.minimum(gl.maximum(clear_low, low), high)
    clear_high = gl.maximum(all_stop - t0, 0) // _BLOCK
    clear_high = gl.minimum(gl.maximum(clear_high, clear_low), high)
    if SCORES:
        # Only keys at the front of the list are interior for all of the tile or for none of it.
        front, back, room = items
        is_alike = gl.minimum(first_item + BN, front + back) <= front
        clear_high = gl.where(is_alike, clear_high, clear_low)
    blocks = (low, clear_low, clear_high, high)

    rows_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF, D], dtype)
    one_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    k_s = gl.allocate_shared_memory(dtype, [2, HALF, D], rows_layout)
    v_s = gl.allocate_shared_memory(dtype, [2, HALF, D], rows_layout)
    q_s = gl.allocate_shared_memory(dtype, [STAGES, _BLOCK, D], rows_layout)
    do_s = gl.allocate_shared_memory(dtype, [STAGES, _BLOCK, D], rows_layout)
    lse_s = gl.allocate_shared_memory(gl.float32, [STAGES, _BLOCK], one_layout)
    delta_s = gl.allocate_shared_memory(gl.float32, [STAGES, _BLOCK], one_layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=COPIERS + 1)
        mbarrier.init(free.index(slot), count=2)
    LINE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    d = gl.arange(0, D, layout=gl.SliceLayout(0, LINE))
    for half in gl.static_range(2):
        row_item = first_item + half * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(1, LINE))
        row_key, _, _, _ = _key_of(row_item, items, keys_at, ends_at, window, fallback, WINDOW)
        k_base = k_ptr + batch * k_b + head.to(gl.int64) * k_h
        v_base = v_ptr + batch * v_b + head.to(gl.int64) * v_h
        copy_rows(k_base, row_key, k_n, d, k_s.index(half), WIDE)
        copy_rows(v_base, row_key, v_n, d, v_s.index(half), WIDE)
    async_copy.commit_group()

    q0 = (first_query + t0 - shift).to(gl.int64)
    q_head = (head * GROUP).to(gl.int64)
    stat = (batch * heads * GROUP + q_head) * queries + q0
    # Adding to a 64-bit zero widens arguments that may be compile-time constants.
    zero = batch * 0
    row_at = row * row_keys
    async_copy.wait_group(0)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_compute, (
                keys_at, ends_at, run_start + row_at, run_stop + row_at,
                dk_ptr + row_at * D, dv_ptr + row_at * D, column_ptr + row_at,
                k_s.index(0), v_s.index(0), q_s, do_s, lse_s, delta_s, full, free,
                blocks, scale, window, t0, t1 - t0, fallback, items, first_item,
                GROUP, D, STAGES, SCORES, WINDOW, ATOMIC,
            )),
            (_compute, (
                keys_at, ends_at, run_start + row_at, run_stop + row_at,
                dk_ptr + row_at * D, dv_ptr + row_at * D, column_ptr + row_at,
                k_s.index(1), v_s.index(1), q_s, do_s, lse_s, delta_s, full, free,
                blocks, scale, window, t0, t1 - t0, fallback, items,
                first_item + HALF,
                GROUP, D, STAGES, SCORES, WINDOW, ATOMIC,
            )),
            (_copy, (
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

    def launch(grid, tiles, is_window, first_tile=0, tile_step=1):
        _key_gradient_hopper[grid](
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
    launch((tiles.shape[0], geometry.heads), tiles, True)
    parts = triton.cdiv(lists.capacity, KEYS)
    count = lists.tiles.shape[0]
    if parts and deterministic:
        # Batch items share no key, so their super tiles of one place may run together.
        together = 1 if geometry.packed else geometry.batch
        step = count // together
        for place in range(step):
            launch((parts, together, geometry.heads), lists.tiles, False, place, step)
    elif parts:
        launch((parts, count, geometry.heads), lists.tiles, False)
    return dk, dv, sums
