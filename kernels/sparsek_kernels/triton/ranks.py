"""Keys of every segment from best to worst: one sort of them all, then taken apart by segment."""

import torch
import triton
import triton.language as tl

from sparsek_kernels.triton.geometry import Geometry, descending_order
from sparsek_kernels.triton.launches.launch import launch

MOST_KEYS = 2**31 - 1  # of all rows together, which indices of 32 bits count
# What two launches take apart, where a second sort would be six operations: rows, each a column of
# a program's counts, and programs, of which each adds up what all before it have counted.
MOST_ROWS, MOST_PROGRAMS = 16, 4096
_COUNTS = 8192  # places times rows of a program
_LINES = 128  # counts of programs that are added up together


@triton.jit
def _invert(order, short, rank, keys, BLOCK: tl.constexpr):
    """The order in 32 bits, and the rank of every key."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(order + at, mask=at < keys, other=0).to(tl.int32)
    tl.store(short + at, key, mask=at < keys)
    tl.store(rank + key, at, mask=at < keys)


@triton.jit
def _row_hits(order, keys, numbers, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Of a program's places: which exist, their keys, and int32 [BLOCK, ROWS], 1 at a key's row."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numbers
    key = tl.load(order + at, mask=inside, other=0).to(tl.int32)
    row = tl.arange(0, ROWS)
    hits = ((key // keys)[:, None] == row[None, :]) & inside[:, None]
    return inside, key, hits.to(tl.int32)


@triton.jit(do_not_specialize=("keys", "numbers"))
def _count_rows(order, counts, keys, numbers, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """counts int32 [programs, ROWS]: keys of each row among a program's places."""
    _, _, hits = _row_hits(order, keys, numbers, ROWS, BLOCK)
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tl.store(counts + at, tl.sum(hits, 0))


@triton.jit(do_not_specialize=("keys", "numbers"))
def _take_apart(
    order, counts, short, rank, keys, numbers,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """As `_invert`, of an order in which rows are still mixed; each takes its own range."""
    inside, key, hits = _row_hits(order, keys, numbers, ROWS, BLOCK)
    row = tl.arange(0, ROWS)
    before = row * keys
    for start in range(0, tl.program_id(0), LINES):
        line = start + tl.arange(0, LINES)
        earlier = counts + line[:, None] * ROWS + row[None, :]
        before += tl.sum(tl.load(earlier, mask=(line < tl.program_id(0))[:, None], other=0), 0)
    places = tl.cumsum(hits, 0) - hits + before[None, :]
    place = tl.sum(hits * places, 1)
    tl.store(short + place, key, mask=inside)
    tl.store(rank + key, place, mask=inside)


def rank_order(scores: torch.Tensor, geometry: Geometry) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys of each sequence and head from best to worst, ties to the earlier key.

    Args:
        scores: float64 [B, G, M], no -0.0; -inf ranks last.
    Returns:
        order int32 [B*G*M], flat key indices (a sequence keeps its own range of places), and its
        inverse, rank int32 [B*G*M].
    """
    flat = scores.reshape(-1)
    numbers = flat.numel()
    if numbers >= MOST_KEYS:
        raise ValueError(f"{numbers} keys times heads: at most 2^31 - 2 fit one call")
    short = torch.empty(numbers, dtype=torch.int32, device=flat.device)
    rank = torch.empty_like(short)
    columns = triton.next_power_of_2(geometry.rows)
    block = _COUNTS // columns
    programs = triton.cdiv(numbers, block)
    if geometry.packed or not 1 < columns <= MOST_ROWS or programs > MOST_PROGRAMS:
        order = descending_order(flat, geometry)
        grid = (triton.cdiv(numbers, 1024),)
        launch(_invert, grid, order, short, rank, numbers, BLOCK=1024, num_warps=4)
        return short, rank
    order = torch.sort(flat, descending=True, stable=True).indices
    counts = torch.empty(programs, columns, dtype=torch.int32, device=flat.device)
    found, sizes = (geometry.keys, numbers), dict(ROWS=columns, BLOCK=block, num_warps=4)
    launch(_count_rows, (programs,), order, counts, *found, **sizes)
    launch(_take_apart, (programs,), order, counts, short, rank, *found, LINES=_LINES, **sizes)
    return short, rank
