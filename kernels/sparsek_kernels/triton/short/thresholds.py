"""tau of every prefix of a short call, in two launches: blocks in order, then a search per query.

`thresholds/descent.py` finds the same numbers with a launch or two per level of its tree, for which
a short call waits. Here scores are put in order within blocks of `BLOCK`, with the sums of those up
to each; f_t(x), the sum of clip(e - x, 0, 1) over the candidates of query t, is then two searches
in each block of the prefix. It falls with x and is a straight line between two breakpoints:
Newton's steps find the line on which it is k (five to ten of them), and a bracket keeps them from
going astray.

Sums are of distances from the best score of a block: an offset of all scores is in none of them.
All have a fixed order: the same bits in every run.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sparsek_kernels.triton.geometry import Geometry, head_budgets
from sparsek_kernels.triton.launches.launch import launch
from sparsek_kernels.triton.short.blocks import (
    BLOCK,
    MEETS,
    begins_before,
    better,
    block_from,
    tile_from,
)

BLOCKS = 2  # that are searched at once: one search waits for memory at every step
NEAR = tl.constexpr(1e-9)  # f_t is k where it is this close: above all rounding of its sums
_STEP = tl.constexpr(4e-9)  # so far below its solution scores are full that rounding made less
_SURE = tl.constexpr(1e-12)  # a line is found where the next step is as short, per unit of tau
_TURNS = tl.constexpr(200)  # of a search: bisection alone ends before
_NONE = tl.constexpr(-float("inf"))


class _Level(NamedTuple):
    """f of some queries at a number x of each, float64 or int32 like x.

    mass: sum of e - x over keys between x and x + 1; part: how many these are. full: keys from
    x + 1 on; least: the lowest score of these, +inf where there are none.
    """

    mass: tl.tensor
    part: tl.tensor
    full: tl.tensor
    least: tl.tensor


@triton.jit(do_not_specialize=("count", "steps", "heads", "row_keys", "sinks"))
def _sort_blocks(
    scores, sequences, ordered, count, steps, heads, row_keys, sinks,
    PACKED: tl.constexpr, BLOCK: tl.constexpr, MEETS: tl.constexpr,
):  # fmt: skip
    """The blocks that begin in a tile of a row: scores from the best to the worst, and sums.

    `ordered` is two arrays: scores, -inf for keys that are no candidates, and of those up to each
    place the sum of distances from the best of the block.
    """
    line = tl.program_id(1).to(tl.int64) * row_keys
    sums = ordered + tl.num_programs(1).to(tl.int64) * row_keys
    tile, tile_stop, number = tile_from(sequences, heads, row_keys, count, steps, PACKED, BLOCK)
    more = 1
    while more > 0:
        first, begin, stop = block_from(sequences, number, tile, BLOCK)
        if begin < tl.minimum(tile_stop, stop):
            stop = tl.minimum(begin + BLOCK, stop)
            own = begin + tl.arange(0, BLOCK)
            inside = own < stop
            score = tl.load(scores + line + own, mask=inside & (own - first >= sinks), other=_NONE)
            score = tl.where(score > _NONE, score, _NONE)  # NaN is no number
            rank = tl.zeros([BLOCK], tl.int32)
            for at in range(begin, stop, MEETS):
                there = at + tl.arange(0, MEETS)
                known = (there < stop) & (there - first >= sinks)
                other = tl.load(scores + line + there, mask=known, other=_NONE)
                other = tl.where(other > _NONE, other, _NONE)
                better = other[:, None] > score[None, :]
                better |= (other[:, None] == score[None, :]) & (there[:, None] < own[None, :])
                rank += tl.sum((better & (there < stop)[:, None]).to(tl.int32), 0)
            tl.store(ordered + line + begin + rank, score, mask=inside)
            tl.debug_barrier()  # read by other threads of this program
            score = tl.load(ordered + line + own, mask=inside, other=_NONE)
            best = tl.max(score, 0)
            away = tl.where(score > _NONE, tl.where(score > _NONE, score, 0.0) - best, 0.0)
            tl.store(sums + line + own, tl.cumsum(away, 0), mask=inside)
        number += 1
        more = begins_before(sequences, number, count, tile_stop, PACKED)


@triton.jit
def _with_block(found, values, sums, at, x, BLOCK: tl.constexpr):
    """`found`, a `_Level`, with the whole block at `at`."""
    best = tl.load(values + at)
    low = better(values, at, at, x, False, True, BLOCK)
    high = better(values, at, at, x + 1, True, True, BLOCK)
    away = tl.load(sums + at + low - 1, mask=low > 0, other=0.0)
    away -= tl.load(sums + at + high - 1, mask=high > 0, other=0.0)
    count = low - high
    worst = tl.load(values + at + high - 1, mask=high > 0, other=float("inf"))
    return _Level(
        found.mass + tl.where(count > 0, away + count.to(tl.float64) * (best - x), 0.0),
        found.part + count,
        found.full + high,
        tl.minimum(found.least, worst),
    )


@triton.jit
def _with_tile(found, raw, x, own, first, begin, stop, sinks, MEETS: tl.constexpr):
    """`found` with those keys of begin .. stop that stand no later than each of `own`."""
    for at in range(begin, stop, MEETS):
        there = at + tl.arange(0, MEETS)
        known = (there < stop) & (there - first >= sinks)
        other = tl.load(raw + there, mask=known, other=_NONE)[:, None]
        seen = (there[:, None] <= own[None, :]) & (other > _NONE)
        is_full = seen & (other >= x[None, :] + 1)
        is_part = seen & (is_full == 0) & (other > x[None, :])
        least = tl.min(tl.where(is_full, other, float("inf")), 0)
        found = _Level(
            found.mass + tl.sum(tl.where(is_part, other - x[None, :], 0.0), 0),
            found.part + tl.sum(is_part.to(tl.int32), 0),
            found.full + tl.sum(is_full.to(tl.int32), 0),
            tl.minimum(found.least, least),
        )
    return found


@triton.jit
def _level(
    values, sums, raw, x, own, first, begin, stop, sinks,
    BLOCK: tl.constexpr, MEETS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """f at x of the prefixes up to `own`, see `_Level`.

    values, sums, raw: the row's blocks in order, and its scores as they come.
    """
    none = tl.zeros(x.shape, tl.int32)
    found = _Level(x * 0.0, none, none, x * 0.0 + float("inf"))
    whole = first + (begin - first) // (BLOCKS * BLOCK) * (BLOCKS * BLOCK)
    for start in range(first, whole, BLOCKS * BLOCK):
        for n in tl.static_range(BLOCKS):
            found = _with_block(found, values, sums, start + n * BLOCK, x, BLOCK)
    for at in range(whole, begin, BLOCK):
        found = _with_block(found, values, sums, at, x, BLOCK)
    return _with_tile(found, raw, x, own, first, begin, stop, sinks, MEETS)


@triton.jit
def _bounds(values, raw, own, first, begin, stop, sinks, BLOCK: tl.constexpr):
    """(candidates up to each of `own`, a score that none is below, one that none is above)."""
    low = tl.full([BLOCK], float("inf"), tl.float64)
    high = tl.full([BLOCK], _NONE, tl.float64)
    count = tl.zeros([BLOCK], tl.int32)
    lane = tl.arange(0, BLOCK)
    for at in range(first, begin, BLOCK):
        score = tl.load(values + at + lane)
        there = score > _NONE
        count += there.to(tl.int32)
        low = tl.minimum(low, tl.where(there, score, float("inf")))
        high = tl.maximum(high, score)
    score = tl.load(raw + own, mask=(own < stop) & (own - first >= sinks), other=_NONE)
    there = score > _NONE
    low = tl.minimum(low, tl.where(there, score, float("inf")))
    high = tl.maximum(high, tl.where(there, score, _NONE))
    count = tl.sum(count, 0) + tl.cumsum(there.to(tl.int32), 0)
    lowest = tl.min(low, 0)
    any_there = lowest < float("inf")
    return count, tl.where(any_there, lowest, 0.0), tl.where(any_there, tl.max(high, 0), 0.0)


@triton.jit
def _solve(
    values, sums, raw, own, k, first, begin, stop, sinks,
    BLOCK: tl.constexpr, MEETS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """tau of the prefixes up to `own`: keys begin .. stop of a sequence that starts at `first`."""
    count, low, high = _bounds(values, raw, own, first, begin, stop, sinks, BLOCK)
    asked = (own < stop) & (count > k) & (k > 0)
    low = tl.zeros([BLOCK], tl.float64) + (low - 1)  # all are full
    high = tl.zeros([BLOCK], tl.float64) + high  # none is above
    x = low + (high - low) * 0.5
    wanted = k.to(tl.float64)
    pending = asked
    turn = 0
    while (tl.max(pending.to(tl.int32), 0) > 0) & (turn < _TURNS):
        at = _level(values, sums, raw, x, own, first, begin, stop, sinks, BLOCK, MEETS, BLOCKS)
        over = at.mass + at.full.to(tl.float64) - wanted
        low = tl.where(pending & (over >= -NEAR), x, low)
        high = tl.where(pending & (over < -NEAR), x, high)
        step = over / tl.maximum(at.part, 1).to(tl.float64)
        on_line = (at.part > 0) & (tl.abs(step) <= tl.maximum(tl.abs(x), 1.0) * _SURE)
        level = (at.part == 0) & (tl.abs(over) <= NEAR)
        newton = x + step
        is_inner = (at.part > 0) & (newton > low) & (newton < high)
        follow = tl.where(is_inner, newton, low + (high - low) * 0.5)
        is_last = (follow <= low) | (follow >= high)  # two numbers beside each other
        x = tl.where(pending & (level == 0), tl.where(on_line, newton, follow), x)
        pending = pending & ((on_line | level | is_last) == 0)
        turn += 1
    # Where f is level, or would be but for rounding, the lowest full score is just 1 above tau.
    below = x - _STEP
    at = _level(values, sums, raw, below, own, first, begin, stop, sinks, BLOCK, MEETS, BLOCKS)
    edge = tl.where(at.full > 0, at.least - 1, x)
    at = _level(values, sums, raw, edge, own, first, begin, stop, sinks, BLOCK, MEETS, BLOCKS)
    over = at.mass + at.full.to(tl.float64) - wanted
    x = tl.where(tl.abs(over) <= NEAR, edge, x)
    return tl.where(asked, x, _NONE)


@triton.jit(do_not_specialize=("count", "steps", "heads", "row_keys", "window", "sinks"))
def _thresholds_of_short(
    scores, ordered, sequences, budgets, tau, count, steps, heads, row_keys, window, sinks,
    PACKED: tl.constexpr, BLOCK: tl.constexpr, MEETS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """tau of key x belongs to query x + window."""
    line = tl.program_id(1).to(tl.int64) * row_keys
    sums = ordered + tl.num_programs(1).to(tl.int64) * row_keys + line
    k = tl.load(budgets + tl.program_id(1) % heads)
    tile, tile_stop, number = tile_from(sequences, heads, row_keys, count, steps, PACKED, BLOCK)
    more = 1
    while more > 0:
        first, begin, stop = block_from(sequences, number, tile, BLOCK)
        if begin < tl.minimum(tile_stop, stop):
            own = begin + tl.arange(0, BLOCK)
            found = _solve(
                ordered + line, sums, scores + line, own, k, first, begin,
                tl.minimum(begin + BLOCK, stop), sinks, BLOCK, MEETS, BLOCKS,
            )  # fmt: skip
            tl.store(tau + line + own + window, found, mask=own + window < stop)
            early = (own < stop) & (own - first < window)
            tl.store(tau + line + own, own * 0.0 + _NONE, mask=early)
        number += 1
        more = begins_before(sequences, number, count, tile_stop, PACKED)


def short_thresholds(
    scores: torch.Tensor,
    topk: Sequence[int],
    window: int,
    geometry: Geometry,
    sinks: int,
) -> torch.Tensor:
    """tau float64 [B, G, N]: `thresholds.descent.prefix_thresholds`, whose arguments it takes."""
    batch, heads, keys = scores.shape
    e = scores.contiguous()
    device, sequences = e.device, geometry.sequences
    ordered = torch.empty(2 * e.numel(), dtype=torch.float64, device=device)
    tau = torch.empty(e.shape, dtype=torch.float64, device=device)
    grid = (triton.cdiv(keys, BLOCK), batch * heads)
    found = geometry.count, geometry.count.bit_length(), heads, keys
    options = dict(PACKED=geometry.packed, BLOCK=BLOCK, MEETS=MEETS, num_warps=4)
    launch(_sort_blocks, grid, e, sequences, ordered, *found, sinks, **options)
    launch(
        _thresholds_of_short, grid,
        e, ordered, sequences, head_budgets(tuple(topk), device), tau, *found, window, sinks,
        BLOCKS=BLOCKS, **options,
    )  # fmt: skip
    return tau
