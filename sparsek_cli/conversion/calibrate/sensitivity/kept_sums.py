"""Sums over the keys that a candidate keeps, for a CPU: of keys in the order of their scores.

A query keeps the first k of its prefix in that order, so that a sum at a small size reads a small
part of the keys, where a mask over all of them reads all, at every size and for every candidate.
Of the keys in order, those of later tokens are no candidates yet and stand in between: queries with
prefixes of like length look at as many columns, so these are taken together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

# Prefixes of queries that are taken together differ at most by this factor.
_ALIKE = 1.4


class KeptSums:
    """Attention over the keys that queries keep, not yet divided by its weights.

    Args:
        weights: [G, Q, R, N] float32, of dense attention: Q heads of a group, R queries.
        value: [G, N, E] float32.
        seen: [R, N] bool, keys that a query sees in any case: sinks and window.
        candidates: [R] int64, how many keys from the first that is no sink may be selected.
        sinks: keys before these. sizes: [L] int64, how many are selected.

    Attributes:
        dense: [G, Q, R, E] with all keys.
    """

    def __init__(
        self,
        weights: torch.Tensor,
        value: torch.Tensor,
        seen: torch.Tensor,
        candidates: torch.Tensor,
        sinks: int,
        sizes: torch.Tensor,
    ):
        self._sinks, self._sizes = sinks, sizes.int()
        self.dense = self._sums(weights, value)
        self._always = self._sums(weights * seen, value)
        self._blocks = [
            _Block.of(weights, value, block, candidates[block], sinks)
            for block in _alike(candidates.tolist())
        ]

    @staticmethod
    def _sums(weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return torch.matmul(weights.flatten(1, 2), value).unflatten(1, weights.shape[1:3])

    def of(self, effective: torch.Tensor) -> torch.Tensor:
        """[G, L, Q, R, E] of one candidate with scores [G, N] float64, at every size."""
        sums = self._always[:, None].repeat(1, len(self._sizes), 1, 1, 1)
        for block in self._blocks:
            # More slots than candidates: nothing is lost, and nothing rounded.
            whole = self._sizes[:, None] >= block.candidates
            for level, selected in block.selected(effective, self._sinks, self._sizes, whole):
                sums[:, level, :, block.rows] += selected
            own = sums[:, :, :, block.rows]
            own.copy_(
                torch.where(whole[None, :, None, :, None], self.dense[:, None, :, block.rows], own)
            )
        return sums


@dataclass(frozen=True)
class _Block:
    """Queries whose prefixes are alike.

    Attributes:
        rows: which of the R. candidates: [r] int32 of each.
        weights: [G * M, Q * r] and value: [G * M, E] of the M keys that are candidates of any.
    """

    rows: slice
    candidates: torch.Tensor
    weights: torch.Tensor
    value: torch.Tensor

    @classmethod
    def of(
        cls,
        weights: torch.Tensor,
        value: torch.Tensor,
        rows: slice,
        candidates: torch.Tensor,
        sinks: int,
    ) -> _Block:
        keys = slice(sinks, sinks + int(candidates.max()))
        mine = weights[:, :, rows, keys].permute(0, 3, 1, 2)
        return cls(rows, candidates.int(), mine.flatten(2).flatten(0, 1),
                   value[:, keys].flatten(0, 1))  # fmt: skip

    def selected(
        self, effective: torch.Tensor, sinks: int, sizes: torch.Tensor, whole: torch.Tensor
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Number of each size, and the sums [G, Q, r, E] over the keys selected at it.

        Sizes at which no query selects are left out, and queries of `whole` [L, r] undefined.
        """
        groups, rows = len(effective), len(self.candidates)
        keys = self.weights.shape[0] // groups
        # Stable: of equal scores the earlier token comes first, as in the kernels.
        scores = effective[:, sinks : sinks + keys]
        order = scores.sort(dim=-1, descending=True, stable=True).indices
        joined = order.int()[:, None] < self.candidates[:, None]
        ranks = joined.cumsum(-1, dtype=torch.int32)  # [G, r, M]
        ends = torch.searchsorted(ranks, sizes.repeat(groups, rows, 1)) + 1
        ends.masked_fill_(whole.T | (sizes == 0), 0)
        widths = ends.amax((0, 1)).tolist()
        most = max(widths)
        if not most:
            return
        places = (order[:, :most] + keys * torch.arange(groups)[:, None]).flatten()
        weights = self.weights.index_select(0, places).view(groups, most, -1, rows)
        weights *= joined[:, :, :most].transpose(1, 2)[:, :, None]
        value = self.value.index_select(0, places).view(groups, most, -1)
        column = torch.arange(most)[:, None]
        for level, width in enumerate(widths):
            if width:
                taken = column[:width] < ends[:, None, :, level]
                kept = (weights[:, :width] * taken[:, :, None]).flatten(2)
                sums = torch.bmm(kept.transpose(1, 2), value[:, :width])
                yield level, sums.unflatten(1, (-1, rows))


def _alike(candidates: list[int]) -> list[slice]:
    """Runs of queries whose numbers of candidates differ little."""
    bounds, least, most = [0], *[max(1, candidates[0])] * 2
    for number, count in enumerate(candidates):
        count = max(1, count)
        if max(most, count) > _ALIKE * min(least, count):
            bounds.append(number)
            least = most = count
        least, most = min(least, count), max(most, count)
    return [slice(*pair) for pair in zip(bounds, [*bounds[1:], len(candidates)], strict=True)]
