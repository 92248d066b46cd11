"""Which queries and keys belong together: sequences of a batch, or documents packed in one row.

Every kernel sees key coordinates: inside the row of a batch item and KV head the keys are numbered
0..M-1, the queries are the last keys of their sequence, and "query t" means the key index of that
query. A carried state therefore needs nothing special: its slots are simply earlier keys.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

from sparsek_kernels.triton.documents.tables import (
    segments_in_order,
    sequence_table,
    tile_tables,
)

SEQUENCE_FIELDS = 6  # batch item, first query, queries, first key, keys, first key of the window


@dataclass(frozen=True)
class Geometry:
    """Shapes of one call.

    Attributes:
        batch, heads, group: batch size, KV heads, query heads per KV head.
        queries, keys: length of the query and of the key axis (N and M).
        sequences: int32 [S, 6], one line per batch item or document, see `SEQUENCE_FIELDS`.
        packed: documents are packed along the row (S documents) instead of one per batch item.
        longest: an upper bound on the keys of one sequence, known without asking the device.
        regular: one sequence per batch item, all of one length, whose window may reach every key.
    """

    batch: int
    heads: int
    group: int
    queries: int
    keys: int
    sequences: torch.Tensor
    packed: bool
    longest: int
    regular: bool

    @property
    def count(self) -> int:
        return self.sequences.shape[0]

    @property
    def rows(self) -> int:
        return self.batch * self.heads

    def tiles(self, size: int) -> torch.Tensor:
        """Query tiles of `size`: int32 [T, 2] of (sequence, index in it); sequence -1 is unused.

        Packed documents get N / size + S tiles, an upper bound that needs no device
        synchronisation.
        """
        if not self.packed:
            return self.plain_tiles(size)
        total, none = self.queries // size + self.count, head_budgets((0,), self.sequences.device)
        return tile_tables(self.sequences, none, total, size, 0)[0]

    def plain_tiles(self, size: int) -> torch.Tensor:
        """`tiles` made by PyTorch."""
        if not self.packed:
            return _dense_tiles(self.batch, self.queries, size, self.sequences.device)
        counts = (self.sequences[:, 2] + size - 1) // size
        return _ragged(counts, self.queries // size + self.count)


def ragged_index(counts: torch.Tensor, total: int) -> torch.Tensor:
    """int32 [total, 2] of (owner, index in owner), owner -1 past the end; `total` is a bound."""
    return _ragged(counts, total)


def _ragged(counts: torch.Tensor, total: int) -> torch.Tensor:
    ends = counts.cumsum(0)
    place = torch.arange(total, device=counts.device)
    owner = torch.searchsorted(ends, place, right=True)
    inside = owner < counts.shape[0]
    owner = owner.clamp(max=counts.shape[0] - 1)
    index = place - (ends[owner] - counts[owner])
    return torch.stack((torch.where(inside, owner, -1), index), dim=1).to(torch.int32)


@lru_cache(maxsize=256)
def head_budgets(topk: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """k of each KV head, int32 [G]; kept, because a copy to the device waits for all its work."""
    return torch.tensor(topk, dtype=torch.int32, device=device)


@lru_cache(maxsize=256)
def _dense_tiles(batch: int, queries: int, size: int, device: torch.device) -> torch.Tensor:
    per_row = -(-queries // size)
    place = torch.arange(batch * per_row, device=device)
    return torch.stack((place // per_row, place % per_row), dim=1).to(torch.int32)


@lru_cache(maxsize=256)
def _dense_sequences(batch: int, queries: int, keys: int, device: torch.device) -> torch.Tensor:
    table = torch.zeros(batch, SEQUENCE_FIELDS, dtype=torch.int32)
    table[:, 0] = torch.arange(batch)
    table[:, 2] = queries
    table[:, 4] = keys
    return table.to(device)


def geometry(
    q_shape: torch.Size,
    k_shape: torch.Size,
    device: torch.device,
    cu_seqlens: torch.Tensor | None = None,
    cu_keys: torch.Tensor | None = None,
    window_start: torch.Tensor | None = None,
) -> Geometry:
    """Geometry of q [B, H, N, D] and k [B, G, M, D].

    Args:
        cu_seqlens: int32 [S + 1], document bounds along N (B must be 1).
        cu_keys: int32 [S + 1], the same along M when a carried state puts slots before each
            document; None means the queries' own bounds.
        window_start: int32 [S], first key index a window may reach (slots of a state that are
            still empty lie before it); None means the first key of the sequence.
    """
    batch, q_heads, queries, _ = q_shape
    _, heads, keys, _ = k_shape
    if cu_seqlens is None:
        sequences = _dense_sequences(batch, queries, keys, device)
        if window_start is not None:
            sequences = sequences.clone()
            sequences[:, 5] = window_start
    elif cu_keys is None and window_start is None:
        sequences = sequence_table(cu_seqlens.to(device).contiguous())
    else:
        sequences = plain_sequence_table(cu_seqlens.to(device), cu_keys, window_start)
    packed = cu_seqlens is not None
    return Geometry(
        batch, heads, q_heads // heads, queries, keys, sequences, packed, keys,
        regular=not packed and window_start is None,
    )  # fmt: skip


def plain_sequence_table(
    bounds: torch.Tensor, key_bounds: torch.Tensor | None, window_start: torch.Tensor | None
) -> torch.Tensor:
    """int32 [S, 6], the `sequences` of documents, whose arguments `geometry` has."""
    bounds = bounds.int()
    key_bounds = bounds if key_bounds is None else key_bounds.to(bounds)
    first = key_bounds[:-1] if window_start is None else window_start.to(torch.int32)
    return torch.stack(
        (
            torch.zeros_like(bounds[:-1]), bounds[:-1], bounds.diff(),
            key_bounds[:-1], key_bounds.diff(), first,
        ),
        dim=1,
    ).contiguous()  # fmt: skip


# Segments of the flat key axis: the keys of one KV head in one sequence, side by side.


def descending_order(flat: torch.Tensor, geometry: Geometry, per_key: int = 1) -> torch.Tensor:
    """Places of `flat` (per_key numbers for each flat key) from high to low inside every segment.

    int64; ties keep their order, and a segment keeps its own range of places. One sort of all
    numbers and one of their segments, a byte each for up to 256: faster than a segmented sort.
    """
    order = torch.sort(flat, descending=True, stable=True).indices
    segments = geometry.rows * (geometry.count if geometry.packed else 1)
    if segments == 1:
        return order
    small = torch.uint8 if segments <= 256 else torch.int16 if segments <= 2**15 else torch.int32
    if geometry.packed:
        segment = segments_in_order(order, geometry.sequences, geometry.keys, per_key, small)
    else:
        segment = order.div(geometry.keys * per_key, rounding_mode="floor").to(small)
    return order[torch.sort(segment, stable=True).indices]
