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

from sparsek_kernels.state import EMPTY
from sparsek_kernels.triton.effective import effective_score
from sparsek_kernels.triton.geometry import Geometry, head_budgets
from sparsek_kernels.triton.selection import FOREVER

BLOCK = 128  # keys of a program, one of each thread
MEETS = 32  # keys of a block that all of them meet at once
BLOCKS = 4  # in which each is looked up at once: one search waits for memory at every step
_EMPTY = tl.constexpr(EMPTY)
_FOREVER = tl.constexpr(FOREVER)
_NOBODY = tl.constexpr(-(2**63))  # below all scores: no candidate
_NEVER = tl.constexpr(2**63 - 1)  # above all: nobody is better


@triton.jit
def _effective(
    scores, slope, at, place, inside, step, sinks, SLOPED: tl.constexpr, LISTED: tl.constexpr
):
    """float64 effective scores of keys `at` of a row, `place` in their sequence; sinks +inf.

    Scores that are LISTED are comparable already, and +inf where they are sinks'.
    """
    score = tl.load(scores + at.to(tl.int64) * step, mask=inside, other=-float("inf"))
    score = score.to(tl.float64) if LISTED else effective_score(score, slope, place, SLOPED)
    return tl.where(place < sinks, float("inf"), score)


@triton.jit
def _ordered(score, inside):
    """int64 in the order of the scores; sinks are no candidates."""
    bits = (score + 0.0).to(tl.int64, bitcast=True)  # + 0.0: -0.0 has other bits than 0.0
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFFFFFFFFFF, bits)
    return tl.where(inside & (score != float("inf")), bits, _NOBODY)


@triton.jit
def _is_asked(key):
    """Whether a key may be selected: not those of -inf, and nobody."""
    return key > -0x7FF0000000000001


@triton.jit
def _sequence_of(sequences, row, heads, at, count, steps, PACKED: tl.constexpr):
    """Number of the last sequence of a row that begins at or before key `at`."""
    number = row // heads
    if PACKED:
        number = 0
        high = count
        for _ in range(steps):
            middle = (number + high) // 2
            begins = tl.load(sequences + 6 * middle + 3, mask=high - number > 1, other=0)
            low = (high - number > 1) & (begins <= at)
            high = tl.where((high - number > 1) & (begins > at), middle, high)
            number = tl.where(low, middle, number)
    return number


@triton.jit
def _block_from(sequences, number, at, BLOCK: tl.constexpr):
    """Of a sequence: (first key, first one of its first block from key `at` on, end)."""
    first = tl.load(sequences + 6 * number + 3)
    stop = first + tl.load(sequences + 6 * number + 4)
    return first, first + tl.maximum(at - first + BLOCK - 1, 0) // BLOCK * BLOCK, stop


@triton.jit
def _begins_before(sequences, number, count, tile_stop, PACKED: tl.constexpr):
    """1 if there is a sequence `number` that begins before `tile_stop`."""
    more = 0
    if PACKED and number < count:
        more = (tl.load(sequences + 6 * number + 3) < tile_stop).to(tl.int32)
    return more


@triton.jit(
    do_not_specialize=(
        "scores_b", "scores_h", "step", "count", "steps", "heads", "row_keys", "sinks",
    ),
    do_not_specialize_on_alignment=("scores", "slopes"),
)  # fmt: skip
def _order_blocks(
    scores, slopes, positions, sequences, ordered, best, places, effective, end,
    scores_b, scores_h, step, count, steps, heads, row_keys, sinks,
    SLOPED: tl.constexpr, LISTED: tl.constexpr, STORED: tl.constexpr, PACKED: tl.constexpr,
    BLOCK: tl.constexpr, MEETS: tl.constexpr,
):  # fmt: skip
    """The blocks that begin in a tile of a row and head: keys as `_ordered`, in their order, too.

    `best` has those of a block from the best to the worst, `places` of each its key's place in the
    block, times BLOCK, and how many better ones of the block come before it. `end` is known of
    sinks and of keys that are never selected.

    Compiled without fused multiply-add: effective scores must be those that steps compute.
    """
    row = tl.program_id(1)
    head = row % heads
    scores += (row // heads).to(tl.int64) * scores_b + head.to(tl.int64) * scores_h
    slope = tl.load(slopes + head) if SLOPED else 0.0
    line = row.to(tl.int64) * row_keys
    tile = tl.program_id(0) * BLOCK
    tile_stop = tl.minimum(tile + BLOCK, row_keys)
    number = _sequence_of(sequences, row, heads, tile, count, steps, PACKED)
    more = 1
    while more > 0:
        first, begin, stop = _block_from(sequences, number, tile, BLOCK)
        if begin < tl.minimum(tile_stop, stop):
            stop = tl.minimum(begin + BLOCK, stop)
            own = begin + tl.arange(0, BLOCK)
            inside = own < stop
            score = _effective(scores, slope, own, own - first, inside, step, sinks, SLOPED, LISTED)
            key = _ordered(score, inside)
            tl.store(ordered + line + own, key, mask=inside)
            tl.debug_barrier()  # read by other threads of this program
            before = tl.zeros([BLOCK], tl.int32)
            behind = tl.zeros([BLOCK], tl.int32)
            for at in range(begin, stop, MEETS):
                there = at + tl.arange(0, MEETS)
                other = tl.load(ordered + line + there, mask=there < stop, other=_NOBODY)
                earlier = there[:, None] < own[None, :]
                better = other[:, None] > key[None, :]
                equal = earlier & (other[:, None] == key[None, :])
                before += tl.sum((equal | (better & earlier)).to(tl.int32), 0)
                behind += tl.sum((better & (earlier == 0)).to(tl.int32), 0)
            rank = begin + before + behind
            tl.store(best + line + rank, key, mask=inside)
            tl.store(places + line + rank, (own - begin) * BLOCK + before, mask=inside)
            if STORED:
                tl.store(effective + line + own, score, mask=inside)
            is_sink = inside & (score == float("inf"))
            if LISTED:  # a sink's slot may be empty
                is_sink &= tl.load(positions + line + own, mask=is_sink, other=_EMPTY) != _EMPTY
            leaves = tl.where(is_sink, _FOREVER, 0)
            tl.store(end + line + own, leaves, mask=inside & (_is_asked(key) == 0))
        number += 1
        more = _begins_before(sequences, number, count, tile_stop, PACKED)


@triton.jit
def _probe(
    best, at, stop, key, found, SIZE: tl.constexpr, EQUAL: tl.constexpr, WHOLE: tl.constexpr
):
    """`found`, and SIZE more where so many further ones of the block at `at` are better."""
    probe = at + found + (SIZE - 1)
    if WHOLE:
        other = tl.load(best + probe)
    else:
        other = tl.load(best + probe, mask=probe < stop, other=_NOBODY)
    return found + tl.where((other >= key) if EQUAL else (other > key), SIZE, 0)


@triton.jit
def _better(best, at, stop, key, EQUAL: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """int32, like `key`: how many of the block at `at` are better; EQUAL: or as good."""
    found = tl.zeros(key.shape, tl.int32)
    for step in tl.static_range(1, BLOCK.bit_length()):
        found = _probe(best, at, stop, key, found, BLOCK >> step, EQUAL, WHOLE)
    return _probe(best, at, stop, key, found, 1, EQUAL, WHOLE)


@triton.jit
def _count_before(best, first, begin, key, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """int32, like `key`: better or equal ones in the blocks from `first` to `begin`."""
    met = tl.zeros(key.shape, tl.int32)
    whole = first + (begin - first) // (BLOCKS * BLOCK) * (BLOCKS * BLOCK)
    for start in range(first, whole, BLOCKS * BLOCK):
        for n in tl.static_range(BLOCKS):
            met += _better(best, start + n * BLOCK, begin, key, True, True, BLOCK)
    for at in range(whole, begin, BLOCK):
        met += _better(best, at, begin, key, True, True, BLOCK)
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
            better = tl.load(ordered + at, mask=there, other=_NOBODY) > key
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
            more = _better(best, at + n * BLOCK, stop, key, False, True, BLOCK)
            met, block, waiting = _meet(more, at + n * BLOCK, k, met, block, waiting)
        at += BLOCKS * BLOCK
        pending = tl.max(waiting.to(tl.int32), 0)
    for start in range(at, tl.where(pending > 0, stop, at), BLOCK):
        more = _better(best, start, stop, key, False, False, BLOCK)
        met, block, waiting = _meet(more, start, k, met, block, waiting)
    found = _where_met(ordered, own, key, k, stop, met, block, BLOCK, 2 * BLOCKS)
    leaves = tl.where(block >= 0, found + window, _FOREVER)
    return tl.where(never, 0, leaves)


@triton.jit(do_not_specialize=("count", "steps", "heads", "row_keys", "window"))
def _ends_of_short(
    ordered, best, places, sequences, budgets, end, count, steps, heads, row_keys, window,
    PACKED: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """`end` of what may be selected in the blocks that `_order_blocks` made of a tile."""
    row = tl.program_id(1)
    line = row.to(tl.int64) * row_keys
    k = tl.load(budgets + row % heads)
    tile = tl.program_id(0) * BLOCK
    tile_stop = tl.minimum(tile + BLOCK, row_keys)
    number = _sequence_of(sequences, row, heads, tile, count, steps, PACKED)
    more = 1
    while more > 0:
        first, begin, stop = _block_from(sequences, number, tile, BLOCK)
        if begin < tl.minimum(tile_stop, stop):
            # In their order neighbours look at the same memory.
            at = begin + tl.arange(0, BLOCK)
            place = tl.load(places + line + at, mask=at < stop, other=0)
            own = begin + place // BLOCK
            key = tl.load(best + line + at, mask=at < stop, other=_NOBODY)
            asked = _is_asked(key)
            leaves = tl.zeros([BLOCK], tl.int32) + _FOREVER
            if stop - first > k:
                leaves = _leaves(
                    ordered + line, best + line, own, place % BLOCK,
                    tl.where(asked, key, _NEVER), k, first, begin, stop, window, BLOCK, BLOCKS,
                )  # fmt: skip
            tl.store(end + line + own, leaves, mask=asked)
        number += 1
        more = _begins_before(sequences, number, count, tile_stop, PACKED)


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
    end, places = torch.empty(2, *scores.shape, dtype=torch.int32, device=device)
    ordered, best = torch.empty(2, *scores.shape, dtype=torch.int64, device=device)
    unread = end  # where there is none of a kind
    grid = (triton.cdiv(keys, BLOCK), batch * heads)
    found = geometry.count, geometry.count.bit_length(), heads, keys
    _order_blocks[grid](
        scores, scores if slopes is None else slopes, unread if positions is None else positions,
        sequences, ordered, best, places, unread if effective is None else effective, end,
        *scores.stride(), *found, sinks,
        SLOPED=slopes is not None, LISTED=positions is not None, STORED=effective is not None,
        PACKED=geometry.packed, BLOCK=BLOCK, MEETS=MEETS, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    _ends_of_short[grid](
        ordered, best, places, sequences, head_budgets(tuple(topk), device), end, *found, window,
        PACKED=geometry.packed, BLOCK=BLOCK, BLOCKS=BLOCKS, num_warps=4,
    )  # fmt: skip
    return end
