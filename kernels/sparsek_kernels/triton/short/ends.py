"""Scores -> when each key leaves the selected set, in two launches: blocks in order, then counts.

What `selection.py` finds with two sorts and six launches, and the same numbers. Key j leaves when
the k-th better key has become a candidate. So keys are put in order within blocks of `BLOCK`, and
every key is looked up in each block of its sequence: the better ones before it are counted (k of
them: it is never selected), then those behind it until k are met, and that block is read once more
to find where that was. Of equal scores the earlier key is the better one.

Work is O(N^2 / BLOCK log BLOCK): for some thousand tokens less than what launches cost.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from sparsek_kernels.triton.geometry import Geometry, head_budgets
from sparsek_kernels.triton.launches.launch import launch
from sparsek_kernels.triton.short.blocks import (
    BLOCK,
    FOREVER_,
    MEETS,
    NOBODY,
    begins_before,
    better,
    block_from,
    is_asked,
    order_blocks,
    parts,
    tile_from,
)

BLOCKS = 4  # in which each key is looked up at once: one search waits for memory at every step
_NEVER = tl.constexpr(2**63 - 1)  # above all: nobody is better


@triton.jit
def _count_before(best, first, begin, key, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """int32, like `key`: better or equal ones in the blocks from `first` to `begin`."""
    met = tl.zeros(key.shape, tl.int32)
    whole = first + (begin - first) // (BLOCKS * BLOCK) * (BLOCKS * BLOCK)
    for start in range(first, whole, BLOCKS * BLOCK):
        for n in tl.static_range(BLOCKS):
            met += better(best, start + n * BLOCK, begin, key, True, True, BLOCK)
    for at in range(whole, begin, BLOCK):
        met += better(best, at, begin, key, True, True, BLOCK)
    return met


@triton.jit
def _meet(more, at, k, met, block, waiting):
    """Keys meet `more` better ones in the block at `at`: (met, block, waiting), each like `met`.

    A key that meets its k-th better one stops to count: `block` is where.
    """
    last = waiting & (met + more >= k)
    waiting = waiting & (last == 0)
    return tl.where(waiting, met + more, met), tl.where(last, at, block), waiting


@triton.jit
def _where_met(ordered, own, key, k, stop, met, block, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """Which key of its block, -1 for none, is each one's k-th better one, `met` before it."""
    found = block
    for start in range(0, tl.where(tl.max(block, 0) < 0, 0, BLOCK), STEPS):
        for step in tl.static_range(STEPS):
            at = block + start + step
            there = (block >= 0) & (at > own) & (at < stop)
            better = tl.load(ordered + at, mask=there, other=NOBODY) > key
            met += better.to(tl.int32)
            found = tl.where(better & (met == k), at, found)
    return found


@triton.jit
def _leaves(
    ordered, best, own, before, key, k, first, begin, stop, window,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """`end` [BLOCK] of the keys `own` of the block at `begin` of a sequence, first .. stop.

    They come from the best to the worst. ordered, best: their row. before: better ones of the block
    before each. key: what they are compared by, `_NEVER` where nobody is asked for.
    """
    met = _count_before(best, first, begin, key, BLOCK, BLOCKS)
    met += before
    never = met >= k
    waiting = (never == 0) & (key != _NEVER)
    block = tl.zeros([BLOCK], tl.int32) - 1
    more = tl.arange(0, BLOCK) - before  # all better ones of the block, less those before
    met, block, waiting = _meet(more, begin, k, met, block, waiting)
    at = begin + BLOCK
    pending = tl.max(waiting.to(tl.int32), 0)
    while (at + BLOCKS * BLOCK <= stop) & (pending > 0):
        for n in tl.static_range(BLOCKS):
            more = better(best, at + n * BLOCK, stop, key, False, True, BLOCK)
            met, block, waiting = _meet(more, at + n * BLOCK, k, met, block, waiting)
        at += BLOCKS * BLOCK
        pending = tl.max(waiting.to(tl.int32), 0)
    for start in range(at, tl.where(pending > 0, stop, at), BLOCK):
        more = better(best, start, stop, key, False, False, BLOCK)
        met, block, waiting = _meet(more, start, k, met, block, waiting)
    found = _where_met(ordered, own, key, k, stop, met, block, BLOCK, 2 * BLOCKS)
    leaves = tl.where(block >= 0, found + window, FOREVER_)
    return tl.where(never, 0, leaves)


@triton.jit(do_not_specialize=("count", "steps", "heads", "row_keys", "window"))
def _ends_of_short(
    ordered, sequences, budgets, end, count, steps, heads, row_keys, window,
    PACKED: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """`end` of what may be selected in the blocks that `order_blocks` made of a tile."""
    line, best, places = parts(ordered, row_keys)
    k = tl.load(budgets + tl.program_id(1) % heads)
    tile, tile_stop, number = tile_from(sequences, heads, row_keys, count, steps, PACKED, BLOCK)
    more = 1
    while more > 0:
        first, begin, stop = block_from(sequences, number, tile, BLOCK)
        if begin < tl.minimum(tile_stop, stop):
            # In their order neighbours look at the same memory.
            at = begin + tl.arange(0, BLOCK)
            place = tl.load(places + at, mask=at < stop, other=0).to(tl.int32)
            own = begin + place // BLOCK
            key = tl.load(best + at, mask=at < stop, other=NOBODY)
            asked = is_asked(key)
            leaves = tl.zeros([BLOCK], tl.int32) + FOREVER_
            if stop - first > k:
                leaves = _leaves(
                    ordered + line, best, own, place % BLOCK,
                    tl.where(asked, key, _NEVER), k, first, begin, stop, window, BLOCK, BLOCKS,
                )  # fmt: skip
            tl.store(end + line + own, leaves, mask=asked)
        number += 1
        more = begins_before(sequences, number, count, tile_stop, PACKED)


def short_ends(
    scores: torch.Tensor,
    topk: Sequence[int],
    window: int,
    geometry: Geometry,
    *,
    sinks: int = 0,
    slopes: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    effective: torch.Tensor | None = None,
) -> torch.Tensor:
    """int32 [B, G, M], as `selection.selection_ends`.

    Args:
        scores: [B, G, M] of any floating dtype and strides: effective ones, or u_j, to which
            `slopes` are added; -inf and NaN are never selected.
        sinks: so many first keys of each sequence are sinks, beside those of score +inf.
        slopes: [G], added as slope * place in the sequence; None: nothing is added.
        positions: int64 [B, G, M], dense, of keys listed from a state: EMPTY sinks are no keys.
        effective: float64 [B, G, M], where the effective scores go, +inf for sinks; or None.
    """
    batch, heads, keys = scores.shape
    device, sequences = scores.device, geometry.sequences
    end = torch.empty(scores.shape, dtype=torch.int32, device=device)
    ordered = torch.empty(3 * scores.numel(), dtype=torch.int64, device=device)
    unread = end  # where there is none of a kind
    grid = (triton.cdiv(keys, BLOCK), batch * heads)
    found = geometry.count, geometry.count.bit_length(), heads, keys
    launch(
        order_blocks, grid,
        scores, scores if slopes is None else slopes, unread if positions is None else positions,
        sequences, ordered, unread if effective is None else effective, end,
        *scores.stride(), *found, sinks,
        SLOPED=slopes is not None, LISTED=positions is not None, STORED=effective is not None,
        PACKED=geometry.packed, BLOCK=BLOCK, MEETS=MEETS, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    launch(
        _ends_of_short, grid,
        ordered, sequences, head_budgets(tuple(topk), device), end, *found, window,
        PACKED=geometry.packed, BLOCK=BLOCK, BLOCKS=BLOCKS, num_warps=4,
    )  # fmt: skip
    return end
