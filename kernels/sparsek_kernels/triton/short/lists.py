"""Key lists of tiles of one size in one launch: each program reads all ends that its tile may see.

What `lists.py` builds by way of coarser tiles, key by key in the same order, so that sums over a
list are the same. Lists lie at equal distances, whatever documents are packed: nothing has to be
known of them before the launch, which also finds out which tile is whose.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl

from sparsek_kernels.triton.geometry import Geometry
from sparsek_kernels.triton.launches.launch import launch
from sparsek_kernels.triton.lists import SUPER_TILE, KeyLists
from sparsek_kernels.triton.tiles import sequence_at

BLOCK = 2048  # keys that a program looks at together, fewer than 2^15
WARPS = 8
DOCUMENTS = 128  # that a program looks at together


@triton.jit
def _tile_at(sequences, tile, count, SIZE: tl.constexpr, DOCUMENTS: tl.constexpr):
    """(document of the tile, its place there), -1 for the document behind the last tile."""
    number = -1
    place = 0
    done = 0
    for start in range(0, count, DOCUMENTS):
        document = start + tl.arange(0, DOCUMENTS)
        queries = tl.load(sequences + 6 * document + 2, mask=document < count, other=0)
        parts = (queries + SIZE - 1) // SIZE
        before = done + tl.cumsum(parts, 0) - parts
        mine = (before <= tile) & (tile < before + parts)
        number = tl.maximum(number, tl.max(tl.where(mine, document, -1), 0))
        place += tl.sum(tl.where(mine, tile - before, 0), 0)
        done += tl.sum(parts, 0)
    return number, place


@triton.jit(do_not_specialize=("count", "room", "heads", "row_keys", "window"))
def _list_short(
    end, sequences, tiles, counts, keys, count, room, heads, row_keys, window,
    SIZE: tl.constexpr, RATIO: tl.constexpr, PACKED: tl.constexpr,
    BLOCK: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """The list of one tile and head: keys that all its queries select, then those of some.

    RATIO: tiles of one coarser tile, whose list would come first: its keys of all queries, then the
    others from the last to the first. 0: there is none, and keys come in order.
    """
    tile = tl.program_id(0)
    head = tl.program_id(1)
    one = tile * heads + head
    if PACKED:
        number, place = _tile_at(sequences, tile, count, SIZE, DOCUMENTS)
        if head == 0:
            tl.store(tiles + 2 * tile, number)
            tl.store(tiles + 2 * tile + 1, place)
        if number < 0:
            tl.store(counts + 2 * one, 0)
            tl.store(counts + 2 * one + 1, 0)
            return
    else:
        number = tl.load(tiles + 2 * tile)
        place = tl.load(tiles + 2 * tile + 1)
    its = sequence_at(sequences, number)
    last = its.first_key + its.keys
    first = last - its.queries
    t0 = first + place * SIZE
    t1 = tl.minimum(t0 + SIZE, last)
    ends = end + (its.batch * heads + head) * row_keys
    listed = keys + one.to(tl.int64) * room
    front = 0
    back = 0
    span = tl.maximum(t1 - window - its.first_key, 0)
    items = 2 * span if RATIO else span
    if RATIO:
        s0 = first + place // RATIO * (RATIO * SIZE)
        s1 = tl.minimum(s0 + RATIO * SIZE, last)
    for start in range(0, items, BLOCK):
        item = start + tl.arange(0, BLOCK)
        inside = item < items
        again = item >= span
        key = its.first_key + (tl.where(again, 2 * span - 1 - item, item) if RATIO else item)
        stop = tl.load(ends + key, mask=inside, other=0)
        live = inside & (stop > t0) & (key + window < t1) & (stop > key + window)
        if RATIO:
            live &= ((stop >= s1) & (key + window <= s0)) != again
        whole = (stop >= t1) & (key + window <= t0)
        # Both are counted at once: keys of all queries below, of some above.
        one_more = tl.where(live, tl.where(whole, 1, 1 << 16), 0)
        before = tl.cumsum(one_more, 0) - one_more
        at = tl.where(whole, front + (before & 0xFFFF), room - 1 - back - (before >> 16))
        tl.store(listed + at, key, mask=live)
        more = tl.sum(one_more, 0)
        front += more & 0xFFFF
        back += more >> 16
    tl.store(counts + 2 * one, front)
    tl.store(counts + 2 * one + 1, back)


@lru_cache(maxsize=256)
def _offsets(lists: int, room: int, device: torch.device) -> torch.Tensor:
    """For so many lists; for fewer, too, so that few tables do for packed documents."""
    return torch.arange(lists + 1, dtype=torch.int64, device=device) * room


def short_lists(
    end: torch.Tensor,
    topk: Sequence[int],
    window: int,
    sinks: int,
    geometry: Geometry,
    size: int,
) -> KeyLists:
    """The lists of tiles of `size` queries, a power of two, as `lists.key_lists` has them.

    They serve the forward pass: finer lists are not built of them.

    Args:
        end: int32 [B, G, M] of `selection_ends`.
    """
    device, heads = end.device, geometry.heads
    # At most k + sinks keys at the first query, and one more with each further one.
    room = max(1, min(max(topk) + sinks + size, geometry.longest - window))
    if geometry.packed:
        number = geometry.queries // size + geometry.count
        tiles = torch.empty(number, 2, dtype=torch.int32, device=device)
    else:
        tiles = geometry.tiles(size)
        number = tiles.shape[0]
    lists = number * heads
    counts = torch.empty(lists, 2, dtype=torch.int32, device=device)
    keys = torch.empty(lists * room, dtype=torch.int32, device=device)
    launch(
        _list_short, (number, heads),
        end, geometry.sequences, tiles, counts, keys,
        geometry.count, room, heads, geometry.keys, window,
        SIZE=size, RATIO=SUPER_TILE // size if size < SUPER_TILE < geometry.queries else 0,
        PACKED=geometry.packed, BLOCK=BLOCK, DOCUMENTS=DOCUMENTS, num_warps=WARPS,
    )  # fmt: skip
    offsets = _offsets(triton.next_power_of_2(lists), room, device)
    return KeyLists(size, tiles, offsets, counts, keys, None, room, None)
