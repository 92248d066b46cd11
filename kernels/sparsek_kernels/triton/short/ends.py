"""Scores -> when each key leaves the selected set, in one launch: every key meets every other one.

What `selection.py` finds with two sorts and six launches, and the same numbers. Key j leaves when
the k-th better key has become a candidate, so a program counts, for a tile of keys, the better ones
before each (k of them: it is never selected), goes on behind it until it has met k of them, and
looks once more at the block where that was. Of equal scores the earlier key is the better one.

Work is O(N^2), of one comparison each: for a few thousand tokens less than what launches cost.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from sparsek_kernels.state import EMPTY
from sparsek_kernels.triton.geometry import Geometry, head_budgets
from sparsek_kernels.triton.selection import FOREVER

TILE = 128  # keys of a program, one of each thread
MEETS = 32  # keys that all of them meet at once
CHUNK = 256  # keys after which a program asks whether all its own have left
_EMPTY = tl.constexpr(EMPTY)
_FOREVER = tl.constexpr(FOREVER)
_NOBODY = tl.constexpr(-(2**63))  # below all scores: no candidate
_NEVER = tl.constexpr(2**63 - 1)  # above all: nobody is better


@triton.jit
def _effective(scores, slope, at, place, inside, step, sinks, SLOPED: tl.constexpr):
    """float64 effective scores of keys `at` of a row, `place` in their sequence; sinks +inf."""
    score = tl.load(scores + at.to(tl.int64) * step, mask=inside, other=-float("inf"))
    score = score.to(tl.float64)
    if SLOPED:
        score += slope * place.to(tl.float64)
    return tl.where(place < sinks, float("inf"), score)


@triton.jit
def _ordered(score, inside):
    """int64 in the order of the scores; NaN stands at the ends, sinks are no candidates."""
    bits = (score + 0.0).to(tl.int64, bitcast=True)  # + 0.0: -0.0 has other bits than 0.0
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFFFFFFFFFF, bits)
    return tl.where(inside & (score != float("inf")), bits, _NOBODY)


@triton.jit
def _order(scores, slope, ordered, first, stop, step, sinks, SLOPED: tl.constexpr):
    """All keys of a sequence as `_ordered` makes them.

    Every program of the row writes the same numbers, and reads what it wrote itself.
    """
    for start in range(first, stop, 1024):
        at = start + tl.arange(0, 1024)
        inside = at < stop
        score = _effective(scores, slope, at, at - first, inside, step, sinks, SLOPED)
        tl.store(ordered + at, _ordered(score, inside), mask=inside)
    tl.debug_barrier()  # they are read by other threads of this program


@triton.jit
def _meet(
    ordered, at, stop, own, key, k, met, block, waiting, MASKED: tl.constexpr, MEETS: tl.constexpr
):
    """Own keys meet those from `at` on, which lie behind them: (met, block, waiting) [TILE].

    A key that meets its k-th better one stops to count: `block` is where.
    """
    there = at + tl.arange(0, MEETS)
    if MASKED:
        other = tl.load(ordered + there, mask=there < stop, other=_NOBODY)
        better = (other[:, None] > key[None, :]) & (there[:, None] > own[None, :])
    else:
        other = tl.load(ordered + there)
        better = other[:, None] > key[None, :]
    more = tl.sum(better.to(tl.int32), 0)
    last = waiting & (met + more >= k)
    waiting = waiting & (last == 0)
    return tl.where(waiting, met + more, met), tl.where(last, at, block), waiting


@triton.jit
def _leaves(
    ordered, own, key, k, first, stop, tile_first, window,
    TILE: tl.constexpr, MEETS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """`end` [TILE] of the keys `own` of one sequence, keys first .. stop of its row.

    ordered: its row. key: what own keys are compared by, `_NEVER` where nobody is asked for.
    """
    lane = tl.arange(0, MEETS)
    begin = tl.maximum(first, tile_first)
    fits = stop - first <= k  # nobody ever leaves
    met = tl.zeros([TILE], tl.int32)  # better ones, first of all those before
    start = tl.where(fits, begin, first)
    whole = start + (begin - start) // MEETS * MEETS
    for at in range(start, whole, MEETS):
        other = tl.load(ordered + at + lane)
        met += tl.sum((other[:, None] >= key[None, :]).to(tl.int32), 0)
    for at in range(whole, tl.minimum(begin + TILE, stop), MEETS):
        other = tl.load(ordered + at + lane, mask=at + lane < stop, other=_NOBODY)
        better = (other[:, None] >= key[None, :]) & ((at + lane)[:, None] < own[None, :])
        met += tl.sum(better.to(tl.int32), 0)
    never = met >= k
    waiting = (never == 0) & (key != _NEVER) & (fits == 0)
    block = tl.zeros([TILE], tl.int32) - 1
    for at in range(begin, tl.minimum(begin + TILE, stop), MEETS):
        met, block, waiting = _meet(
            ordered, at, stop, own, key, k, met, block, waiting, True, MEETS
        )
    at = begin + TILE
    pending = tl.max(waiting.to(tl.int32), 0)
    while (at + CHUNK <= stop) & (pending > 0):
        for start in range(at, at + CHUNK, MEETS):
            met, block, waiting = _meet(
                ordered, start, stop, own, key, k, met, block, waiting, False, MEETS
            )
        at += CHUNK
        pending = tl.max(waiting.to(tl.int32), 0)
    for start in range(at, tl.where(pending > 0, stop, at), MEETS):
        met, block, waiting = _meet(
            ordered, start, stop, own, key, k, met, block, waiting, True, MEETS
        )
    # Which one of its block is each one's k-th.
    found = block
    for step in tl.static_range(MEETS):
        at = block + step
        there = (block >= 0) & (at > own) & (at < stop)
        better = tl.load(ordered + at, mask=there, other=_NOBODY) > key
        met += better.to(tl.int32)
        found = tl.where(better & (met == k), at, found)
    leaves = tl.where(block >= 0, found + window, _FOREVER)
    return tl.where(never, 0, leaves)


@triton.jit(
    do_not_specialize=(
        "scores_b", "scores_h", "step", "count", "steps", "heads", "row_keys", "sinks", "window",
    ),
    do_not_specialize_on_alignment=("scores", "slopes"),
)  # fmt: skip
def _ends_of_short(
    scores, slopes, positions, sequences, budgets, ordered, effective, end,
    scores_b, scores_h, step, count, steps, heads, row_keys, sinks, window,
    SLOPED: tl.constexpr, LISTED: tl.constexpr, STORED: tl.constexpr, PACKED: tl.constexpr,
    TILE: tl.constexpr, MEETS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """`end` of a tile of keys of one row and head; their effective scores where STORED.

    Compiled without fused multiply-add: effective scores must be those that steps compute.
    """
    row = tl.program_id(1)
    head = row % heads
    scores += (row // heads).to(tl.int64) * scores_b + head.to(tl.int64) * scores_h
    slope = tl.load(slopes + head).to(tl.float64) if SLOPED else 0.0
    k = tl.load(budgets + head)
    line = row.to(tl.int64) * row_keys
    tile_first = tl.program_id(0) * TILE
    tile_stop = tl.minimum(tile_first + TILE, row_keys)
    own = tile_first + tl.arange(0, TILE)
    number = row // heads
    if PACKED:
        number = 0  # the last sequence that begins at or before the tile
        high = count
        for _ in range(steps):
            middle = (number + high) // 2
            begins = tl.load(sequences + 6 * middle + 3, mask=high - number > 1, other=0)
            low = (high - number > 1) & (begins <= tile_first)
            high = tl.where((high - number > 1) & (begins > tile_first), middle, high)
            number = tl.where(low, middle, number)
    first = tl.load(sequences + 6 * number + 3)
    more = 1
    while more > 0:
        stop = first + tl.load(sequences + 6 * number + 4)
        inside = (own >= first) & (own < stop)
        score = _effective(scores, slope, own, own - first, inside, step, sinks, SLOPED)
        is_sink = inside & (score == float("inf"))
        key = _ordered(score, inside)
        # -inf, and nobody: never selected. None of them has to meet anybody.
        asked = inside & (is_sink == 0) & (key > -0x7FF0000000000001)
        _order(scores, slope, ordered + line, first, stop, step, sinks, SLOPED)
        leaves = _leaves(
            ordered + line, own, tl.where(asked, key, _NEVER), k, first, stop, tile_first, window,
            TILE, MEETS, CHUNK,
        )  # fmt: skip
        if LISTED:  # a sink's slot may be empty
            is_sink &= tl.load(positions + line + own, mask=is_sink, other=_EMPTY) != _EMPTY
        leaves = tl.where(asked, leaves, tl.where(is_sink, _FOREVER, 0))
        tl.store(end + line + own, leaves, mask=inside)
        if STORED:
            tl.store(effective + line + own, score, mask=inside)
        more = 0
        if PACKED:
            number += 1
            if number < count:
                first = tl.load(sequences + 6 * number + 3)
                more = (first < tile_stop).to(tl.int32)


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
        scores: [B, G, M] of any floating dtype and strides; effective ones, or u_j with `slopes`.
        sinks: so many first keys of each sequence are sinks, beside those of score +inf.
        slopes: [G], added as slope * place in the sequence; None: nothing is added.
        positions: int64 [B, G, M], dense, of keys listed from a state: EMPTY sinks are no keys.
        effective: float64 [B, G, M], where the effective scores go, +inf for sinks; or None.
    """
    batch, heads, keys = scores.shape
    end = torch.empty(scores.shape, dtype=torch.int32, device=scores.device)
    ordered = torch.empty(scores.shape, dtype=torch.int64, device=scores.device)
    unread = end  # where there is none of a kind
    _ends_of_short[(triton.cdiv(keys, TILE), batch * heads)](
        scores, scores if slopes is None else slopes, unread if positions is None else positions,
        geometry.sequences, head_budgets(tuple(topk), scores.device),
        ordered, unread if effective is None else effective, end,
        *scores.stride(), geometry.count, geometry.count.bit_length(), heads, keys, sinks, window,
        SLOPED=slopes is not None, LISTED=positions is not None, STORED=effective is not None,
        PACKED=geometry.packed, TILE=TILE, MEETS=MEETS, CHUNK=CHUNK,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return end
