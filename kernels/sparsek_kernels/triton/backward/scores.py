"""The gradient of the scores: interior runs, and du from two sums of the gate gradient.

du of a key is dm summed over its interior queries, less the mean of dm over all interior keys at
each of them (method section 3): the means are summed over a run as `running_sums` does it.
"""

import torch
import triton
import triton.language as tl

from sparsek_kernels.triton.documents.tables import document_at
from sparsek_kernels.triton.geometry import Geometry
from sparsek_kernels.triton.launches.launch import launch
from sparsek_kernels.triton.running_sums import sum_between

BLOCK = 1024  # keys of a program, and queries whose means are summed together


@triton.jit
def _count_below(tau, low, high, value, steps, EQUAL: tl.constexpr):
    """[N] the first place in low .. high of rising tau that is above `value`, or not below it."""
    for _ in range(steps):
        middle = (low + high) // 2
        open_ = low < high
        its = tl.load(tau + middle, mask=open_, other=0.0)
        passed = open_ & ((its <= value) if EQUAL else (its < value))
        high = tl.where(open_ & (passed == 0), middle, high)
        low = tl.where(passed, middle + 1, low)
    return low


@triton.jit(do_not_specialize=["count", "document_steps", "steps"])
def _interior_runs(
    scores, tau, sequences, starts, stops, changes, count, document_steps, row_keys, steps,
    window, sinks, PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    row = tl.program_id(1)
    line = row.to(tl.int64) * row_keys
    key = block * BLOCK + tl.arange(0, BLOCK)
    inside = key < row_keys
    e = tl.load(scores + line + key, mask=inside, other=0.0)
    first = key * 0
    last = first + row_keys
    if PACKED:
        its = sequences + 6 * document_at(sequences, key, count, document_steps)
        first = tl.load(its + 3, mask=inside, other=0)
        last = first + tl.load(its + 4, mask=inside, other=0)
    low = _count_below(tau + line, first, last, e - 1, steps, True)
    high = _count_below(tau + line, first, last, e, steps, False)
    start = tl.maximum(low, key + window)
    stop = tl.maximum(start, high)
    is_sink = key - first < sinks
    tl.store(starts + line + key, tl.where(is_sink, 0, start), mask=inside)
    tl.store(stops + line + key, tl.where(is_sink, 0, stop), mask=inside)
    # Whole numbers: the order in which they are added does not matter.
    totals = changes + tl.num_programs(1).to(tl.int64) * row_keys + row * tl.num_programs(0)
    changes += line
    counts = inside & (is_sink == 0) & (start < stop)
    tl.atomic_add(changes + start, 1, mask=counts, sem="relaxed")
    tl.atomic_add(totals + start // BLOCK, 1, mask=counts, sem="relaxed")
    counts &= stop < row_keys
    tl.atomic_add(changes + stop, -1, mask=counts, sem="relaxed")
    tl.atomic_add(totals + stop // BLOCK, -1, mask=counts, sem="relaxed")


def interior_runs(
    scores: torch.Tensor,
    tau: torch.Tensor,
    window: int,
    geometry: Geometry,
    sinks: int,
) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """int32 [B, G, M] twice: key j is interior (e > tau and e - 1 < tau) for queries [a, b).

    And how many more keys are interior at each query than at the one before, with the sums of each
    block of queries behind them: int32, for `score_gradient`.

    Args:
        scores, tau: float64 [B, G, M]; tau never decreases inside a sequence.
        sinks: so many first keys of every sequence are never interior.
    """
    batch, heads, keys = scores.shape
    rows, blocks, device = batch * heads, triton.cdiv(keys, BLOCK), scores.device
    starts, stops = torch.empty((2, *scores.shape), dtype=torch.int32, device=device)
    changes = torch.zeros(rows * (keys + blocks), dtype=torch.int32, device=device)
    launch(
        _interior_runs, (blocks, rows),
        scores.contiguous(), tau, geometry.sequences, starts, stops, changes,
        geometry.count, geometry.count.bit_length(), keys, geometry.longest.bit_length(),
        window, sinks, PACKED=geometry.packed, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return (starts, stops), changes


@triton.jit
def _interior_means(
    row_sum, changes, means, totals, row_keys, GROUP: tl.constexpr, BLOCK: tl.constexpr
):
    """Mean of dm over the interior keys of each query, summed up to it within its block."""
    block = tl.program_id(0)
    blocks = tl.num_programs(0)
    row = tl.program_id(1).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    block_changes = changes + tl.num_programs(1).to(tl.int64) * row_keys + row * blocks
    before = tl.zeros([BLOCK], tl.int32)
    for start in range(0, block, BLOCK):
        at = start + lane
        before += tl.load(block_changes + at, mask=at < block, other=0)
    query = block * BLOCK + lane
    inside = query < row_keys
    change = tl.load(changes + row * row_keys + query, mask=inside, other=0)
    members = tl.sum(before, 0) + tl.cumsum(change, 0)
    total = tl.zeros([BLOCK], tl.float64)
    for head in range(GROUP):
        line = row_sum + (row * GROUP + head) * row_keys
        total += tl.load(line + query, mask=inside, other=0.0).to(tl.float64)
    mean = total / tl.maximum(members, 1).to(tl.float64)
    tl.store(means + row * row_keys + query, tl.cumsum(mean, 0), mask=inside)
    tl.store(totals + row * blocks + block, tl.sum(mean, 0))


@triton.jit
def _less_means(column_sum, starts, stops, means, totals, de, row_keys, BLOCK: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    line = row * row_keys
    key = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = key < row_keys
    start = tl.load(starts + line + key, mask=inside, other=0)
    stop = tl.load(stops + line + key, mask=inside, other=0)
    own = totals + row * tl.num_programs(0)
    taken = sum_between(means + line, own, start, stop, inside, BLOCK)
    given = tl.load(column_sum + line + key, mask=inside, other=0.0).to(tl.float64)
    tl.store(de + line + key, given - taken, mask=inside)


def score_gradient(
    column_sum: torch.Tensor,
    row_sum: torch.Tensor,
    runs: tuple[torch.Tensor, torch.Tensor],
    changes: torch.Tensor,
) -> torch.Tensor:
    """de float64 [B, G, M]: du of method section 3 from the two sums of dm over interior pairs.

    Args:
        column_sum: float32 [B, G, M], over the queries of a key (and the heads of the group).
        row_sum: float32 [B, H, N], over the keys of a query.
        runs, changes: of `interior_runs`.
    """
    batch, heads, keys = column_sum.shape
    blocks, rows, device = triton.cdiv(keys, BLOCK), batch * heads, column_sum.device
    means = torch.empty(rows * keys, dtype=torch.float64, device=device)
    totals = torch.empty(rows * blocks, dtype=torch.float64, device=device)
    de = torch.empty(column_sum.shape, dtype=torch.float64, device=device)
    launch(
        _interior_means, (blocks, rows),
        row_sum, changes, means, totals, keys,
        GROUP=row_sum.shape[1] // heads, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    launch(
        _less_means, (blocks, rows),
        column_sum, *runs, means, totals, de, keys, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return de
