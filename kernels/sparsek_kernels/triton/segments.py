"""Segments of the flat key axis: the keys of one KV head in one sequence, side by side."""

import torch

from sparsek_kernels.triton.geometry import Geometry


def owners(geometry: Geometry, flat_keys: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """First flat key and number of keys of the segment of every flat key, int64."""
    place = torch.arange(flat_keys, device=device)
    row = place.div(geometry.keys, rounding_mode="floor")
    if not geometry.packed:
        return row * geometry.keys, torch.full_like(place, geometry.keys)
    starts = geometry.sequences[:, 3].contiguous().long()
    document = torch.searchsorted(starts, place - row * geometry.keys, right=True) - 1
    return row * geometry.keys + starts[document], geometry.sequences[:, 4].long()[document]


def descending_order(flat: torch.Tensor, geometry: Geometry, per_key: int = 1) -> torch.Tensor:
    """Places of `flat` (per_key numbers for each flat key) from high to low inside every segment.

    int64; ties keep their order, and a segment keeps its own range of places. One sort of all
    numbers and one of their segments, a byte each for up to 256: faster than a segmented sort.
    """
    order = torch.sort(flat, descending=True, stable=True).indices
    segments = geometry.rows * (geometry.count if geometry.packed else 1)
    if segments == 1:
        return order
    segment = order.div(geometry.keys * per_key, rounding_mode="floor")
    if geometry.packed:
        starts = geometry.sequences[:, 3].contiguous()
        key = order.div(per_key, rounding_mode="floor") - segment * geometry.keys
        document = torch.searchsorted(starts, key, right=True) - 1
        segment = segment * geometry.count + document
    small = torch.uint8 if segments <= 256 else torch.int16 if segments <= 2**15 else torch.int32
    return order[torch.sort(segment.to(small), stable=True).indices]
