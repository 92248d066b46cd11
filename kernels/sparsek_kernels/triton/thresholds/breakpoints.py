"""Scores -> signed breakpoints about an integer near the scores, by rank and in order of arrival.

The integer keeps float32 scores exact in sums, whatever their offset.
"""

import triton
import triton.language as tl

from sparsek_kernels.triton.documents.tables import document_at


@triton.jit
def segment(key, inside, first_keys, lengths, row_keys, PACKED: tl.constexpr):
    """First flat key and number of keys of the segment of each flat key."""
    if PACKED:
        first = tl.load(first_keys + key, mask=inside, other=0)
        length = tl.load(lengths + key, mask=inside, other=1)
    else:
        first = key // row_keys * row_keys
        length = first * 0 + row_keys
    return first, length


@triton.jit
def finite_scores(scores, centres, key, inside, row_keys):
    """(scores of flat keys, centre of their rows); -inf and NaN as the row's stand-in for them."""
    row = key // row_keys
    e = tl.load(scores + key, mask=inside, other=0.0)
    absent = tl.load(centres + 2 * row + 1, mask=inside, other=0.0)
    return tl.where(e > -float("inf"), e, absent), tl.load(
        centres + 2 * row, mask=inside, other=0.0
    )


@triton.jit
def row_centres(scores, centres, row_keys, BLOCK: tl.constexpr):
    """Of a row: its mean, rounded down, and what stands for -inf.

    That is 2 below the row's lowest score: no gate of another key is then below 1.
    """
    row = tl.program_id(0)
    scores += row.to(tl.int64) * row_keys
    lowest = tl.full([BLOCK], float("inf"), tl.float64)
    total = tl.zeros([BLOCK], tl.float64)
    present = tl.zeros([BLOCK], tl.int32)
    for start in range(0, row_keys, BLOCK):
        at = start + tl.arange(0, BLOCK)
        e = tl.load(scores + at, mask=at < row_keys, other=-float("inf"))
        is_there = e > -float("inf")
        lowest = tl.where(is_there, tl.minimum(lowest, e), lowest)
        total += tl.where(is_there, e, 0.0)
        present += is_there.to(tl.int32)
    count = tl.sum(present, 0)
    absent = tl.where(count > 0, tl.min(lowest, 0) - 2, 0.0)
    mean = (tl.sum(total, 0) + absent * (row_keys - count).to(tl.float64)) / row_keys
    tl.store(centres + 2 * row, tl.floor(mean))
    tl.store(centres + 2 * row + 1, absent)


@triton.jit
def breakpoints(
    scores, centres, values, sequences, first_keys, lengths, keys, row_keys, count, steps,
    PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Both breakpoints of each key about its row's centre; of documents the segments of keys."""
    key = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = key < keys
    e, centre = finite_scores(scores, centres, key, inside, row_keys)
    e -= centre
    tl.store(values + 2 * key, e, mask=inside)
    tl.store(values + 2 * key + 1, e - 1, mask=inside)
    if PACKED:
        place = key % row_keys
        line = sequences + 6 * document_at(sequences, place, count, steps)
        first = tl.load(line + 3, mask=inside, other=0)
        tl.store(first_keys + key, key - place + first, mask=inside)
        tl.store(lengths + key, tl.load(line + 4, mask=inside, other=0), mask=inside)


@triton.jit
def arrange(
    order, values, first_keys, lengths, here, ordered, sign, when,
    sums, counts, nodes, arrived, size, row_keys, sinks,
    PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The root: breakpoints by rank, their ranks in order of arrival; and every query's start."""
    rank = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rank < size
    place = tl.load(order + rank, mask=inside, other=0).to(tl.int32)
    key = place >> 1
    first, _ = segment(key, inside, first_keys, lengths, row_keys, PACKED)
    mark = tl.where(key - first < sinks, 0, 1 - 2 * (place & 1))
    tl.store(ordered + rank, tl.load(values + place, mask=inside, other=0.0), mask=inside)
    tl.store(sign + rank, mark, mask=inside)
    tl.store(when + rank, place, mask=inside)
    tl.store(here + place, rank, mask=inside)
    query = rank
    inside = query < size // 2
    first, _ = segment(query, inside, first_keys, lengths, row_keys, PACKED)
    tl.store(sums + query, 0.0, mask=inside)
    tl.store(counts + query, 0, mask=inside)
    tl.store(nodes + query, 2 * first, mask=inside)
    tl.store(arrived + query, 2 * (query + 1 - first), mask=inside)
