"""Queries of a program that owns keys, on Hopper: which matter, in what order; their copies."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier

BLOCK = gl.constexpr(64)  # queries of a step
_FAR = gl.constexpr(2**31 - 1)


@gluon.jit
def key_of(item, items, keys_at, ends_at, window, fallback, WINDOW: gl.constexpr):
    """Keys of some items, which of them exist, and the queries [begin, stop) that see them."""
    front, back, room, limit = items
    exists = item < limit
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
def blocks_of(
    first_item, items, keys_at, ends_at, window, fallback, t0, t1,
    BN: gl.constexpr, WINDOW: gl.constexpr, SCORES: gl.constexpr,
):  # fmt: skip
    """Blocks of queries, counted from `t0`, that matter to `BN` items.

    [low, high) matter at all; in [clear_low, clear_high) nothing is hidden.
    """
    FLAT: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    item = first_item + gl.arange(0, BN, layout=FLAT)
    key, exists, begin, stop = key_of(item, items, keys_at, ends_at, window, fallback, WINDOW)
    any_begin = gl.min(gl.where(exists, begin, _FAR), 0)
    any_stop = gl.max(stop, 0)
    all_begin = gl.max(gl.where(exists, begin, 0), 0)
    all_stop = gl.minimum(gl.min(gl.where(exists, stop, _FAR), 0), t1)
    low = gl.maximum(any_begin - t0, 0) // BLOCK
    high = (gl.maximum(gl.minimum(any_stop, t1) - t0, 0) + BLOCK - 1) // BLOCK
    high = gl.maximum(high, low)
    clear_low = (gl.maximum(all_begin - t0, 0) + BLOCK - 1) // BLOCK
    clear_low = gl.minimum(gl.maximum(clear_low, low), high)
    clear_high = gl.maximum(all_stop - t0, 0) // BLOCK
    clear_high = gl.minimum(gl.maximum(clear_high, clear_low), high)
    if SCORES:
        front, back, room, limit = items
        clear_high = gl.where(limit <= front, clear_high, clear_low)
    return low, clear_low, clear_high, high


@gluon.jit
def block_of(step, blocks, GROUP: gl.constexpr):
    """Block of queries of a step: blocks without masks first, then both ends."""
    low, clear_low, clear_high, high = blocks
    turn = step // GROUP
    clear = clear_high - clear_low
    after = turn - clear
    ramp = clear_low - low
    hidden = gl.where(after < ramp, low + after, clear_high + after - ramp)
    return gl.where(turn < clear, clear_low + turn, hidden)


@gluon.jit
def copy_queries(
    q_base, do_base, lse_base, delta_base, q_h, q_n, do_h, do_n, queries,
    q_s, do_s, lse_s, delta_s, full, free, blocks, count,
    GROUP: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copies Q, dO and their statistics, block by block; rows past `count` are zero."""
    LINE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    lane = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, LINE))
    flat_lane = gl.arange(0, BLOCK, layout=gl.BlockedLayout([1], [32], [4], [0]))
    d = gl.arange(0, D, layout=gl.SliceLayout(0, LINE))
    low, clear_low, clear_high, high = blocks
    q_offset = (lane * q_n)[:, None] + d[None, :]
    do_offset = (lane * do_n)[:, None] + d[None, :]
    for step in range((high - low) * GROUP):
        slot = step % STAGES
        first = block_of(step, blocks, GROUP) * BLOCK
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
