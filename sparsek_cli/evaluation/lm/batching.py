"""Caches of prompts read one by one, joined so that their answers are written together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional


@dataclass
class Joined:
    """One cache of several rows.

    Attributes:
        cache: of the policy's kind, batch B.
        positions: position of each row's next token, int64 [B].
        mask: bool [B, N], False where shorter rows are padded on the left; None without padding.
    """

    cache: Any
    positions: torch.Tensor
    mask: torch.Tensor | None


def can_join(cache: Any) -> bool:
    """Whether rows of caches of this kind, which may differ in length, can stand in one."""
    from transformers.cache_utils import DynamicLayer

    from sparsek_cli.evaluation.policies.evicting_layer import EvictingLayer
    from sparsek_cli.models import SparseKCache

    layers = cache.layers
    if isinstance(cache, SparseKCache):
        return cache.all_slots
    evicting = all(isinstance(layer, EvictingLayer) for layer in layers)
    return evicting or all(type(layer) is DynamicLayer for layer in layers)


def join(caches: Sequence[Any]) -> Joined | None:
    """The rows of `caches` (batch 1 each) in one cache; they are copied.

    Returns:
        None where the kind of cache cannot be joined.
    """
    from transformers.cache_utils import Cache, DynamicLayer

    from sparsek_cli.models import SparseKCache
    from sparsek_cli.models import join as side_by_side

    if not can_join(caches[0]):
        return None
    seen = [cache.get_seq_length() for cache in caches]
    device = caches[0].layers[0].keys.device
    positions = torch.tensor(seen, device=device)
    if isinstance(caches[0], SparseKCache):
        return Joined(side_by_side(caches), positions, None)
    columns = list(zip(*(cache.layers for cache in caches), strict=True))
    if type(caches[0].layers[0]) is DynamicLayer:
        longest = max(seen)
        layers = [_padded(column, longest) for column in columns]
        mask = torch.arange(longest, device=device) >= longest - positions[:, None]
    else:
        layers, mask = [_evicting(column) for column in columns], None
    whole = object.__new__(type(caches[0]))
    Cache.__init__(whole, layers=layers)
    return Joined(whole, positions, mask)


def like(layer: Any) -> Any:
    """A layer of the same kind and settings, whose tensors are still those of `layer`."""
    new = object.__new__(type(layer))
    new.__dict__.update(layer.__dict__)
    return new


def _evicting(layers: Sequence[Any]) -> Any:
    new = like(layers[0])
    width = max(layer.places.shape[-1] for layer in layers)
    rows = [like(layer) for layer in layers]
    for row in rows:
        row.widen(width)
    for name in ("keys", "values", "mass", "places", "capacity", "after"):
        setattr(new, name, torch.cat([getattr(row, name) for row in rows]))
    new.seen = max(layer.seen for layer in layers)
    new.widest = max(layer.widest for layer in layers)
    return new


def _padded(layers: Sequence[Any], longest: int) -> Any:
    new = like(layers[0])
    for name in ("keys", "values"):
        rows = [getattr(layer, name) for layer in layers]
        padded = [functional.pad(row, (0, 0, longest - row.shape[2], 0)) for row in rows]
        setattr(new, name, torch.cat(padded))
    return new
