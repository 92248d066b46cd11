"""Which keys a block of queries has to look at, from the one number `end` per key."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass
class BlockLists:
    """Key lists of all (row, query block) pairs, called tiles: tile = row * blocks + block.

    A tile sees (a) the keys that are selected, or sinks, at its first query: at most s + k, read
    from a compressed list; (b) the contiguous run of keys whose window overlaps the block, which
    holds every key that becomes selected inside it. A key is in one of the two.
    """

    block: int
    blocks: int
    base: int
    window: int
    keys: int
    starts: Tensor  # [tiles + 1] int64 into `listed`
    widths: list[int]  # per tile, on the host
    listed: Tensor  # [total] int64 key index within its row

    def columns(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Keys of tiles [first, last): index [T, W] int64 and which are real, [T, W] bool."""
        device = self.listed.device
        tiles = torch.arange(first, last, device=device)
        width = max(self.widths[first:last])
        offset = torch.arange(width, device=device)
        at = self.starts[first:last, None] + offset
        real = at < self.starts[first + 1 : last + 1, None]
        old = self.listed[at.clamp(max=max(self.listed.numel() - 1, 0))] if width else at
        near = torch.arange(1, self.block + self.window, device=device) + self.base
        near = near + (tiles % self.blocks * self.block)[:, None]
        inside = (near >= 0) & (near < self.keys)
        index = torch.cat([old.masked_fill(~real, 0), near.clamp(0, self.keys - 1)], 1)
        return index, torch.cat([real, inside], 1)


def block_lists(end: Tensor, *, n: int, base: int, window: int, block: int) -> BlockLists:
    """Lists for query blocks of `block` queries.

    Args:
        end: [R, M] int32, first query that no longer sees the key (see attention.py).
        n: number of queries. base: key m joins the candidates at query m - base.
    """
    rows, keys = end.shape
    blocks = -(-n // block)
    joins = (torch.arange(keys, device=end.device) - base).clamp(min=0)
    first = (joins + block - 1) // block
    last = (end.to(torch.int64).clamp(max=n) + block - 1) // block
    alive = (last - first).clamp(min=0)
    row, key = alive.nonzero(as_tuple=True)
    times = alive[row, key]
    tile = row * blocks + first[key]
    total = int(times.sum())
    before = times.cumsum(0) - times
    step = torch.arange(total, device=end.device) - before.repeat_interleave(
        times, output_size=total
    )
    tile = tile.repeat_interleave(times, output_size=total) + step
    order = tile.argsort(stable=True)
    counts = torch.bincount(tile, minlength=rows * blocks)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    listed = key.repeat_interleave(times, output_size=total)[order]
    return BlockLists(block, blocks, base, window, keys, starts, counts.tolist(), listed)
