"""Scores -> keys in order within blocks of `BLOCK`, and the ends that need no search.

A sequence's blocks begin at its first key, so in a tile of a row at most one block of each sequence
begins; a sequence's last block may be short.
"""

import triton
import triton.language as tl

from sparsek_kernels.state import EMPTY
from sparsek_kernels.triton.documents.tables import document_at
from sparsek_kernels.triton.effective import effective_score
from sparsek_kernels.triton.selection import FOREVER

BLOCK = 128  # keys of a program, one of each thread
MEETS = 32  # keys of a block that all of them meet at once
_EMPTY = tl.constexpr(EMPTY)
FOREVER_ = tl.constexpr(FOREVER)
NOBODY = tl.constexpr(-(2**63))  # below all scores: no candidate


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
    return tl.where(inside & (score != float("inf")), bits, NOBODY)


@triton.jit
def is_asked(key):
    """Whether a key may be selected: not those of -inf, and nobody."""
    return key > -0x7FF0000000000001


@triton.jit
def parts(ordered, row_keys):
    """Where a row's line stands in each of three arrays that are one: (line, best, places)."""
    rows = tl.num_programs(1).to(tl.int64)
    line = tl.program_id(1).to(tl.int64) * row_keys
    best = ordered + rows * row_keys + line
    return line, best, best + rows * row_keys


@triton.jit
def tile_from(sequences, heads, row_keys, count, steps, PACKED: tl.constexpr, BLOCK: tl.constexpr):
    """A program's tile: (first key, end, number of the sequence in which it begins)."""
    tile = tl.program_id(0) * BLOCK
    number = tl.program_id(1) // heads
    if PACKED:
        number = document_at(sequences, tile, count, steps)
    return tile, tl.minimum(tile + BLOCK, row_keys), number


@triton.jit
def block_from(sequences, number, at, BLOCK: tl.constexpr):
    """Of a sequence: (first key, first one of its first block from key `at` on, end)."""
    first = tl.load(sequences + 6 * number + 3)
    stop = first + tl.load(sequences + 6 * number + 4)
    return first, first + tl.maximum(at - first + BLOCK - 1, 0) // BLOCK * BLOCK, stop


@triton.jit
def begins_before(sequences, number, count, tile_stop, PACKED: tl.constexpr):
    """1 if there is a sequence `number` that begins before `tile_stop`."""
    more = 0
    if PACKED and number < count:
        more = (tl.load(sequences + 6 * number + 3) < tile_stop).to(tl.int32)
    return more


@triton.jit
def _probe(
    best, at, stop, key, found, SIZE: tl.constexpr, EQUAL: tl.constexpr, WHOLE: tl.constexpr
):
    """`found`, and SIZE more where so many further ones of the block at `at` are better."""
    probe = at + found + (SIZE - 1)
    if WHOLE:
        other = tl.load(best + probe)
    else:
        other = tl.load(best + probe, mask=probe < stop, other=NOBODY)
    return found + tl.where((other >= key) if EQUAL else (other > key), SIZE, 0)


@triton.jit
def better(best, at, stop, key, EQUAL: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """int32, like `key`: how many of the block at `at` are better; EQUAL: or as good.

    best: keys of any type, from the best to the worst. WHOLE: the block ends before `stop`.
    """
    found = tl.zeros(key.shape, tl.int32)
    for step in tl.static_range(1, BLOCK.bit_length()):
        found = _probe(best, at, stop, key, found, BLOCK >> step, EQUAL, WHOLE)
    return _probe(best, at, stop, key, found, 1, EQUAL, WHOLE)


@triton.jit(
    do_not_specialize=(
        "scores_b", "scores_h", "step", "count", "steps", "heads", "row_keys", "sinks",
    ),
    do_not_specialize_on_alignment=("scores", "slopes"),
)  # fmt: skip
def order_blocks(
    scores, slopes, positions, sequences, ordered, effective, end,
    scores_b, scores_h, step, count, steps, heads, row_keys, sinks,
    SLOPED: tl.constexpr, LISTED: tl.constexpr, STORED: tl.constexpr, PACKED: tl.constexpr,
    BLOCK: tl.constexpr, MEETS: tl.constexpr,
):  # fmt: skip
    """The blocks that begin in a tile of a row and head: keys as `_ordered`, in their order, too.

    `ordered` is three arrays (`parts`). `best` has keys of a block from the best to the worst, and
    `places` of each its place in the block, times BLOCK, and how many better ones of the block
    come before it. `end` is known of sinks and of keys that are never selected.

    Compiled without fused multiply-add: effective scores must be those that steps compute.
    """
    row = tl.program_id(1)
    head = row % heads
    scores += (row // heads).to(tl.int64) * scores_b + head.to(tl.int64) * scores_h
    slope = tl.load(slopes + head) if SLOPED else 0.0
    line, best, places = parts(ordered, row_keys)
    tile, tile_stop, number = tile_from(sequences, heads, row_keys, count, steps, PACKED, BLOCK)
    more = 1
    while more > 0:
        first, begin, stop = block_from(sequences, number, tile, BLOCK)
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
                other = tl.load(ordered + line + there, mask=there < stop, other=NOBODY)
                earlier = there[:, None] < own[None, :]
                better = other[:, None] > key[None, :]
                equal = earlier & (other[:, None] == key[None, :])
                before += tl.sum((equal | (better & earlier)).to(tl.int32), 0)
                behind += tl.sum((better & (earlier == 0)).to(tl.int32), 0)
            rank = begin + before + behind
            tl.store(best + rank, key, mask=inside)
            tl.store(places + rank, (own - begin) * BLOCK + before, mask=inside)
            if STORED:
                tl.store(effective + line + own, score, mask=inside)
            is_sink = inside & (score == float("inf"))
            if LISTED:  # a sink's slot may be empty
                is_sink &= tl.load(positions + line + own, mask=is_sink, other=_EMPTY) != _EMPTY
            leaves = tl.where(is_sink, FOREVER_, 0)
            tl.store(end + line + own, leaves, mask=inside & (is_asked(key) == 0))
        number += 1
        more = begins_before(sequences, number, count, tile_stop, PACKED)
