"""Tables of packed documents, each in one launch, where PyTorch takes a dozen or two.

Their plain twins make the tables of batches, once for all calls of a shape: those of documents
differ from call to call.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsek_kernels.triton.launches.launch import launch

BLOCK = 1024  # lines of a table that a program makes together


@triton.jit
def _owner(stops, steps, count, at):
    """[BLOCK] how many of `count` < 2^steps rising numbers at `stops` are at most `at`."""
    low = tl.zeros_like(at)
    high = tl.zeros_like(at) + count
    for _ in range(steps):
        middle = (low + high) // 2
        open_ = low < high
        passed = open_ & (tl.load(stops + middle, mask=open_, other=0) <= at)
        high = tl.where(open_ & (passed == 0), middle, high)
        low = tl.where(passed, middle + 1, low)
    return low


@triton.jit(do_not_specialize=["count"])
def _sequence_table(bounds, sequences, count, BLOCK: tl.constexpr):
    document = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = document < count
    first = tl.load(bounds + document, mask=inside, other=0).to(tl.int32)
    length = tl.load(bounds + document + 1, mask=inside, other=0).to(tl.int32) - first
    line = sequences + 6 * document
    tl.store(line, 0, mask=inside)
    tl.store(line + 1, first, mask=inside)
    tl.store(line + 2, length, mask=inside)
    tl.store(line + 3, first, mask=inside)
    tl.store(line + 4, length, mask=inside)
    tl.store(line + 5, first, mask=inside)


def sequence_table(bounds: Tensor) -> Tensor:
    """int32 [S, 6], `geometry.plain_sequence_table` of documents [S + 1] without carried keys."""
    count = bounds.shape[0] - 1
    sequences = torch.empty(count, 6, dtype=torch.int32, device=bounds.device)
    if count:
        launch(
            _sequence_table, (triton.cdiv(count, BLOCK),),
            bounds, sequences, count, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
    return sequences


@triton.jit
def _segment_tables(
    sequences, budgets, segments, lines, chunks, count, heads, row_keys, total, steps,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Every program makes all segments, which are few, and its own part of the chunks.

    So all write the same numbers, and a program reads what it wrote itself.
    """
    lane = tl.arange(0, BLOCK)
    done = 0
    tl.store(lines, 0)
    for start in range(0, count, BLOCK):
        segment = start + lane
        inside = segment < count
        line = sequences + 6 * (segment // heads)
        head = segment % heads
        row = tl.load(line, mask=inside, other=0) * heads + head
        first = row * row_keys + tl.load(line + 3, mask=inside, other=0)
        size = tl.load(line + 4, mask=inside, other=0)
        k = tl.load(budgets + head, mask=inside, other=0)
        left = tl.maximum(size - k, 0)
        parts = tl.where(left > 0, (left + CHUNK - 1) // CHUNK + 1, 0)
        tl.store(segments + 3 * segment, first, mask=inside)
        tl.store(segments + 3 * segment + 1, size, mask=inside)
        tl.store(segments + 3 * segment + 2, k, mask=inside)
        tl.store(lines + 1 + segment, done + tl.cumsum(parts, 0), mask=inside)
        done += tl.sum(parts, 0)
    tl.debug_barrier()  # the sums are read back by other threads of this program
    at = tl.program_id(0) * BLOCK + lane
    owner = _owner(lines + 1, steps, count, at)
    inside = (at < total) & (owner < count)
    index = at - tl.load(lines + owner, mask=inside, other=0)
    tl.store(chunks + 2 * at, tl.where(inside, owner, -1), mask=at < total)
    tl.store(chunks + 2 * at + 1, tl.where(inside, index, 0), mask=at < total)


def segment_tables(
    sequences: Tensor, budgets: Tensor, row_keys: int, total: int, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`selection.plain_segment_tables` of documents.

    Args:
        sequences: int32 [S, 6]. budgets: int32 [G]. total: lines of the chunks' table, a bound.
    """
    device, count = sequences.device, sequences.shape[0] * budgets.shape[0]
    segments = torch.empty(count, 3, dtype=torch.int32, device=device)
    chunks = torch.empty(total, 2, dtype=torch.int32, device=device)
    lines = torch.empty(count + 1, dtype=torch.int32, device=device)
    launch(
        _segment_tables, (max(1, triton.cdiv(total, BLOCK)),),
        sequences, budgets, segments, lines, chunks,
        count, budgets.shape[0], row_keys, total, count.bit_length(),
        CHUNK=chunk, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    return segments, chunks, lines


@triton.jit(do_not_specialize=("count", "total", "steps"))  # they differ from step to step
def _tile_tables(
    sequences, most, tiles, offsets, first, stops, count, heads, total, size, window, steps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: the running sums go through all of the table."""
    lane = tl.arange(0, BLOCK)
    done = 0
    for start in range(0, count, BLOCK):
        document = start + lane
        inside = document < count
        queries = tl.load(sequences + 6 * document + 2, mask=inside, other=0)
        parts = (queries + size - 1) // size
        stop = done + tl.cumsum(parts, 0)
        tl.store(first + document, stop - parts, mask=inside)
        tl.store(stops + document, stop, mask=inside)
        done += tl.sum(parts, 0)
    tl.debug_barrier()  # the sums are read back by other threads of this program
    room = tl.zeros([], tl.int64)
    tl.store(offsets, room)
    for start in range(0, total * heads, BLOCK):
        one = start + lane
        tile = one // heads
        head = one % heads
        owner = _owner(stops, steps, count, tile)
        inside = (tile < total) & (owner < count)
        place = tile - tl.load(first + owner, mask=inside, other=0)
        queries = tl.load(sequences + 6 * owner + 2, mask=inside, other=0)
        keys = tl.load(sequences + 6 * owner + 4, mask=inside, other=0)
        older = keys - queries + tl.minimum((place + 1) * size, queries) - window
        older = tl.where(inside, tl.maximum(older, 0), 0)
        its = tl.minimum(older, tl.load(most + head, mask=inside, other=0)).to(tl.int64)
        tl.store(offsets + 1 + one, room + tl.cumsum(its, 0), mask=tile < total)
        room += tl.sum(its, 0)
        writes = (tile < total) & (head == 0)
        tl.store(tiles + 2 * tile, tl.where(inside, owner, -1), mask=writes)
        tl.store(tiles + 2 * tile + 1, tl.where(inside, place, 0), mask=writes)


def tile_tables(
    sequences: Tensor, most: Tensor, total: int, size: int, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Tiles of documents' queries, where their lists lie, and each document's first tile.

    Args:
        sequences: int32 [S, 6]. most: int32 [G], what a list of a head holds at most.
        total: of the tiles, a bound; what is beyond them gets sequence -1.

    Returns:
        int32 [total, 2] as `Geometry.tiles`, int64 [total * G + 1] and int32 [S].
    """
    device, count, heads = sequences.device, sequences.shape[0], most.shape[0]
    tiles = torch.empty(total, 2, dtype=torch.int32, device=device)
    offsets = torch.empty(total * heads + 1, dtype=torch.int64, device=device)
    first, stops = torch.empty(2, count, dtype=torch.int32, device=device)
    launch(
        _tile_tables, (1,),
        sequences, most, tiles, offsets, first, stops, count, heads, total, size, window,
        count.bit_length(), BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    return tiles, offsets, first


@triton.jit
def document_at(sequences, place, count, steps):
    """The last of `count` < 2^steps documents that begins at or before each place of the row."""
    low = tl.zeros_like(place)
    high = tl.zeros_like(place) + count
    for _ in range(steps):
        middle = (low + high) // 2
        open_ = high - low > 1
        starts = tl.load(sequences + 6 * middle + 3, mask=open_, other=0)
        low = tl.where(open_ & (starts <= place), middle, low)
        high = tl.where(open_ & (starts > place), middle, high)
    return low


@triton.jit
def _segments_in_order(
    order, sequences, segment, numbers, count, row_keys, per_key, steps, BLOCK: tl.constexpr
):
    """A program's part of the places, each with the segment that it belongs to."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numbers
    key = tl.load(order + at, mask=inside, other=0) // per_key
    row = key // row_keys
    place = (key - row * row_keys).to(tl.int32)
    document = document_at(sequences, place, count, steps)
    tl.store(segment + at, (row * count + document).to(segment.dtype.element_ty), mask=inside)


def segments_in_order(
    order: Tensor, sequences: Tensor, row_keys: int, per_key: int, dtype: torch.dtype
) -> Tensor:
    """[numbers] row * S + document of each number's key; order: int64 [numbers], see geometry."""
    segment = torch.empty(order.shape, dtype=dtype, device=order.device)
    count = sequences.shape[0]
    launch(
        _segments_in_order, (triton.cdiv(order.numel(), BLOCK),),
        order, sequences, segment, order.numel(), count, row_keys, per_key, count.bit_length(),
        BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return segment
