"""Several sources, one dataset: item i is a pure function of (recipe, seed, i)."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sparsek_cli.data import IGNORED
from sparsek_cli.data.packing import PackedSequence


class Mixture:
    """A map-style dataset of `total` sequences drawn from weighted sources.

    Which source item i comes from, and which sequence of that source it is, are fixed by the seed
    alone, so a run can resume at any position, on any number of processes, with the same data.
    With `joined`, a sequence counts as one document, whatever it was put together from.
    """

    def __init__(
        self,
        sources: Mapping[str, Callable[[int], PackedSequence]],
        weights: Mapping[str, float],
        total: int,
        seed: int,
        joined: bool = False,
    ):
        self.joined = joined
        self.names = list(sources)
        self._sources = list(sources.values())
        share = np.array([weights[name] for name in self.names], dtype=np.float64)
        draws = np.random.default_rng(seed).random(total)
        bounds = np.cumsum(share / share.sum())
        self._choice = np.searchsorted(bounds[:-1], draws, side="right").astype(np.int16)
        self._ordinal = np.zeros(total, dtype=np.int64)
        for number in range(len(self.names)):
            chosen = self._choice == number
            self._ordinal[chosen] = np.arange(chosen.sum())

    def __len__(self) -> int:
        return len(self._choice)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sequence = self._sources[self._choice[index]](int(self._ordinal[index]))
        return {
            "input_ids": sequence.ids,
            "roles": sequence.roles,
            "starts": (0,) if self.joined else sequence.starts,
            "index": index,
        }

    def name_of(self, index: int) -> str:
        """The source that item `index` comes from."""
        return self.names[self._choice[index]]


class HeldOut:
    """The first `count` sequences of a packed source, as a map-style dataset.

    With `joined`, as in `Mixture`.
    """

    def __init__(
        self, packed: Callable[[int], PackedSequence], count: int, *, joined: bool = False
    ):
        self._packed, self._count, self.joined = packed, count, joined

    def __len__(self) -> int:
        return self._count

    def has_targets(self) -> bool:
        """Whether any token is predicted."""
        return any((self._packed(index).roles != IGNORED).any() for index in range(len(self)))

    def __getitem__(self, index: int) -> dict[str, Any]:
        sequence = self._packed(index)
        return {
            "input_ids": sequence.ids,
            "roles": sequence.roles,
            "starts": (0,) if self.joined else sequence.starts,
            "index": index,
        }
