"""Key lists: for each tile of queries, the keys selected by any of its queries.

The lists of small tiles are filtered copies of the lists of the larger tiles around them, so the
work per tile is its parent's list (k + sinks + parent's size) and not the whole prefix. In a list,
keys selected by every query of the tile stand at the front and the others at the back, which is
why most of the attention needs no mask at all. For the gradient of the scores, keys at the front
are also interior for all of the tile or for none of it. The order inside both parts is fixed, so a
sum over a list is the same in every run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from sparsek_kernels.triton.documents.tables import tile_tables
from sparsek_kernels.triton.geometry import Geometry, head_budgets
from sparsek_kernels.triton.launches.launch import launch
from sparsek_kernels.triton.tiles import sequence_at

SUPER_TILE = 1024  # queries of the tiles that the backward pass walks key by key
BLOCK = 1024


@dataclass(frozen=True)
class KeyLists:
    """Lists of all tiles of one size.

    Attributes:
        size: queries per tile.
        tiles: int32 [T, 2], see `Geometry.tiles`.
        offsets: int64 [T*G + 1]; list l = tile*G + head lies in keys[offsets[l] : offsets[l + 1]].
        counts: int32 [T*G, 2]: entries at the front (whole tile) and at the back (part of it).
        keys: int32, key indices inside their row. ends: the same for their `end`, or None.
        capacity: an upper bound on front + back.
        first: int32 [S], first tile of each sequence; None where no finer lists are built.
    """

    size: int
    tiles: torch.Tensor
    offsets: torch.Tensor
    counts: torch.Tensor
    keys: torch.Tensor
    ends: torch.Tensor | None
    capacity: int
    first: torch.Tensor | None


@triton.jit
def _build(
    end, sequences, tiles, offsets, counts, keys, ends,
    parent_index, parent_offsets, parent_counts, parent_keys, parent_ends, run_start, run_stop,
    heads, row_keys, window,
    SIZE: tl.constexpr, RATIO: tl.constexpr, FROM_PARENT: tl.constexpr,
    STORE_END: tl.constexpr, RUNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One list: the keys that are selected somewhere in the tile, whole-tile keys first."""
    tile = tl.program_id(0)
    head = tl.program_id(1)
    one = tile * heads + head
    sequence = tl.load(tiles + 2 * tile)
    if sequence < 0:
        tl.store(counts + 2 * one, 0)
        tl.store(counts + 2 * one + 1, 0)
        return
    place = tl.load(tiles + 2 * tile + 1)
    its = sequence_at(sequences, sequence)
    first_key = its.first_key
    last = first_key + its.keys
    t0 = last - its.queries + place * SIZE
    t1 = tl.minimum(t0 + SIZE, last)
    row = (its.batch * heads + head) * row_keys
    row_end = end + row
    base = tl.load(offsets + one)
    room = tl.load(offsets + one + 1) - base
    front = 0
    back = 0
    if FROM_PARENT:
        above = (tl.load(parent_index + sequence) + place // RATIO) * heads + head
        above_base = tl.load(parent_offsets + above)
        above_room = tl.load(parent_offsets + above + 1) - above_base
        above_front = tl.load(parent_counts + 2 * above)
        above_back = tl.load(parent_counts + 2 * above + 1)
        low = 0
        high = above_front + above_back
    else:
        low = first_key
        high = tl.maximum(t1 - window, low)
    for start in range(low, high, BLOCK):
        item = start + tl.arange(0, BLOCK)
        inside = item < high
        if FROM_PARENT:
            back_item = above_room - above_back + item - above_front
            where = above_base + tl.where(item < above_front, item, back_item)
            key = tl.load(parent_keys + where, mask=inside, other=0)
            key_end = tl.load(parent_ends + where, mask=inside, other=0)
        else:
            key = item
            key_end = tl.load(row_end + item, mask=inside, other=0)
        live = inside & (key_end > t0) & (key + window < t1) & (key_end > key + window)
        whole = live & (key_end >= t1) & (key + window <= t0)
        if RUNS:
            start_run = tl.load(run_start + row + key, mask=whole, other=0)
            stop_run = tl.load(run_stop + row + key, mask=whole, other=0)
            begins = (start_run > t0) & (start_run < t1)
            ceases = (stop_run > t0) & (stop_run < t1)
            whole &= (start_run >= stop_run) | ((begins | ceases) == 0)
        part = (live & (whole == 0)).to(tl.int32)
        whole = whole.to(tl.int32)
        at_front = base + front + tl.cumsum(whole, 0) - whole
        at_back = base + room - 1 - back - (tl.cumsum(part, 0) - part)
        where = tl.where(whole != 0, at_front, at_back)
        tl.store(keys + where, key, mask=live)
        if STORE_END:
            tl.store(ends + where, key_end, mask=live)
        front += tl.sum(whole, 0)
        back += tl.sum(part, 0)
    tl.store(counts + 2 * one, front)
    tl.store(counts + 2 * one + 1, back)


@triton.jit
def _count_kept(end, block_counts, keys, blocks, window, BLOCK: tl.constexpr):
    """Keys of one block of a row that are selected at some time."""
    block = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    key = block * BLOCK + tl.arange(0, BLOCK)
    stop = tl.load(end + row * keys + key, mask=key < keys, other=0)
    tl.store(block_counts + row * blocks + block, tl.sum((stop > key + window).to(tl.int32), 0))


@triton.jit
def _compact(
    end, block_counts, kept, kept_ends, counts, keys, blocks, window,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes those keys and their ends in order; the last block also writes how many there are."""
    block = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    before = 0
    for start in range(0, block, BLOCK):
        at = start + tl.arange(0, BLOCK)
        before += tl.sum(tl.load(block_counts + row * blocks + at, mask=at < block, other=0), 0)
    key = block * BLOCK + tl.arange(0, BLOCK)
    stop = tl.load(end + row * keys + key, mask=key < keys, other=0)
    keep = (stop > key + window).to(tl.int32)
    where = row * keys + before + tl.cumsum(keep, 0) - keep
    tl.store(kept + where, key, mask=keep != 0)
    tl.store(kept_ends + where, stop, mask=keep != 0)
    if block == blocks - 1:
        tl.store(counts + 2 * row, before + tl.sum(keep, 0))
        tl.store(counts + 2 * row + 1, 0)


@lru_cache(maxsize=256)
def _row_offsets(rows: int, keys: int, device: torch.device) -> torch.Tensor:
    return torch.arange(rows + 1, dtype=torch.int64, device=device) * keys


@lru_cache(maxsize=256)
def _first_rows(count: int, device: torch.device) -> torch.Tensor:
    return torch.arange(count, dtype=torch.int32, device=device)


def _ever_selected(end: torch.Tensor, window: int, geometry: Geometry) -> KeyLists:
    """One list per row: its keys that are selected at any time, usually a small part of all."""
    rows, keys, device = geometry.rows, geometry.keys, end.device
    blocks = triton.cdiv(keys, BLOCK)
    block_counts = torch.empty(rows, blocks, dtype=torch.int32, device=device)
    kept = torch.empty(rows * keys, dtype=torch.int32, device=device)
    kept_ends = torch.empty_like(kept)
    counts = torch.empty(rows, 2, dtype=torch.int32, device=device)
    grid = (blocks, rows)
    launch(_count_kept, grid, end, block_counts, keys, blocks, window, BLOCK=BLOCK, num_warps=4)
    launch(
        _compact, grid,
        end, block_counts, kept, kept_ends, counts, keys, blocks, window,
        BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    # One "tile" per sequence, larger than any sequence.
    offsets = _row_offsets(rows, keys, device)
    first = _first_rows(geometry.count, device)
    return KeyLists(1 << 30, geometry.sequences, offsets, counts, kept, kept_ends, keys, first)


def key_lists(
    end: torch.Tensor,
    topk: Sequence[int],
    window: int,
    sinks: int,
    geometry: Geometry,
    sizes: Sequence[int],
    runs: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> list[KeyLists]:
    """Lists for the wanted tile sizes, ascending powers of two; coarser ones help to build them.

    Args:
        end: int32 [B, G, M] from `selection_ends`.
        sizes: tile sizes; each is returned, finest first.
        runs: int32 [B, G, M] twice from `interior_runs`: a key that starts or ceases to be interior
            inside a tile stands at the back of its list.
    """
    wanted = sorted(set(sizes))
    ladder = list(wanted)
    # The coarsest tiles read all keys ever selected (packed documents: their whole prefix), which
    # is fine for some dozens of tiles.
    if ladder[-1] < SUPER_TILE < geometry.queries:
        ladder.append(SUPER_TILE)
    while geometry.queries > 128 * ladder[-1]:
        ladder.append(ladder[-1] * 32)
    built: dict[int, KeyLists] = {}
    parent = None if geometry.packed else _ever_selected(end, window, geometry)
    for size in reversed(ladder):
        keep_ends = size != ladder[0]  # a list is read with its ends by finer ones only
        parent = _lists_of_size(end, runs, topk, window, sinks, geometry, size, parent, keep_ends)
        built[size] = parent
    return [built[size] for size in wanted]


def _lists_of_size(end, runs, topk, window, sinks, geometry, size, parent, keep_ends) -> KeyLists:
    device = end.device
    run_start, run_stop = runs or (end, end)
    room = _room(topk, window, sinks, geometry, size)
    tiles, offsets = room.tiles, room.offsets
    lists = tiles.shape[0] * geometry.heads
    counts = torch.empty(lists, 2, dtype=torch.int32, device=device)
    keys = torch.empty(max(room.total, 1), dtype=torch.int32, device=device)
    ends = torch.empty_like(keys) if keep_ends else None
    made = KeyLists(size, tiles, offsets, counts, keys, ends, room.capacity, room.first)
    above = parent or made
    launch(
        _build, (tiles.shape[0], geometry.heads),
        end, geometry.sequences, tiles, offsets, counts, keys, keys if ends is None else ends,
        above.first, above.offsets, above.counts, above.keys,
        above.keys if above.ends is None else above.ends, run_start, run_stop,
        geometry.heads, geometry.keys, window,
        SIZE=size, RATIO=above.size // size, FROM_PARENT=parent is not None,
        STORE_END=ends is not None, RUNS=runs is not None, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return made


@dataclass(frozen=True)
class Room:
    """Where the lists of tiles of one size lie.

    Attributes:
        tiles, offsets, capacity: see `KeyLists`. first: int32 [S], first tile of each sequence.
        total: entries that all lists hold together, an upper bound.
    """

    tiles: torch.Tensor
    offsets: torch.Tensor
    first: torch.Tensor
    total: int
    capacity: int


_ROOMS: dict[tuple, Room] = {}


def _room(topk, window, sinks, geometry, size) -> Room:
    """The room of lists, without asking the device how long documents are.

    A tile sees at most k + sinks keys at its first query and one more with each further query; and
    never more than the keys older than the window at its last query.
    """
    device, most = geometry.sequences.device, [k + sinks + size for k in topk]
    longest = max(geometry.longest - window, 0)
    per_list = [min(m, longest) for m in most]
    if geometry.packed:
        # First tiles of documents hold at most their own keys; the others are N / size at most.
        whole = geometry.queries // size
        total = sum(per_list) * whole + geometry.keys * geometry.heads
        tables = tile_tables(
            geometry.sequences, head_budgets(tuple(most), device), whole + geometry.count, size,
            window,
        )  # fmt: skip
        return Room(*tables, total, max(per_list))
    key = (geometry.batch, geometry.heads, geometry.queries, geometry.keys, tuple(topk),
           window, sinks, size, device)  # fmt: skip
    if key not in _ROOMS:
        if len(_ROOMS) > 512:
            _ROOMS.clear()
        tables = plain_tile_tables(geometry, most, size, window)
        _ROOMS[key] = Room(*tables, sum(per_list) * tables[0].shape[0], max(per_list))
    return _ROOMS[key]


def plain_tile_tables(
    geometry: Geometry, most: Sequence[int], size: int, window: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tiles, offsets and first tiles, see `Room`; most: what a list of each head holds at most."""
    tiles = geometry.plain_tiles(size)
    line = geometry.sequences[tiles[:, 0].clamp(min=0).long()]
    length = line[:, 4] - line[:, 2] + torch.minimum((tiles[:, 1] + 1) * size, line[:, 2])
    older = (length - window).clamp(min=0) * (tiles[:, 0] >= 0)
    room = torch.minimum(older[:, None], head_budgets(tuple(most), tiles.device)[None, :])
    offsets = torch.zeros(room.numel() + 1, dtype=torch.int64, device=tiles.device)
    offsets[1:] = room.reshape(-1).cumsum(0)
    counts = (geometry.sequences[:, 2] + size - 1) // size
    return tiles, offsets, (counts.cumsum(0) - counts).to(torch.int32)
