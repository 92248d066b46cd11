"""Sums over any stretch of a line of numbers, the same bits in every run.

The numbers are summed in blocks, each from its first one on, and what a block holds is kept beside
them. A stretch is then the difference of two sums and the blocks that it reaches over.
"""

import triton
import triton.language as tl


@triton.jit
def sum_between(sums, totals, low, high, inside, BLOCK: tl.constexpr):
    """[N] sums of the numbers at low .. high - 1, 0 where there are none.

    Args:
        sums: of the numbers of each block of `BLOCK` up to this one, inclusive; so a stretch that
            lies in one line of several may begin and end with it.
        totals: of the blocks.
    """
    some = inside & (high > low)
    found = tl.load(sums + high - 1, mask=some, other=0)
    found -= tl.load(sums + low - 1, mask=some & (low > 0), other=0)
    first = tl.maximum(low - 1, 0) // BLOCK
    last = tl.maximum(high - 1, 0) // BLOCK
    begin = tl.min(tl.where(some, first, 0x7FFFFFFF), 0)
    for block in range(begin, tl.max(tl.where(some, last, 0), 0)):
        reached = some & (first <= block) & (block < last)
        found += tl.where(reached, tl.load(totals + block), 0)
    return found
