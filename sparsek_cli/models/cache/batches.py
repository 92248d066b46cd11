"""Sequences that decode side by side: forks of one, joins of several, rows that come and go."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache

from sparsek_cli.errors import SparsekError
from sparsek_cli.models.cache.layers import SparseKCacheLayer
from sparsek_cli.models.cache.slots import SparseKCache
from sparsek_cli.models.generation.cuda_graphs import Decoder
from sparsek_cli.models.generation.likeliest import likeliest
from sparsek_cli.models.learned_positions import Room


def fork(cache: SparseKCache, copies: int = 1) -> SparseKCache:
    """A cache of its own that continues where `cache` stands, each row `copies` times.

    A document is read once and asked many questions: each of them on a fork.
    """
    new = copy.deepcopy(cache)
    new.given = True
    if copies != 1:
        new.batch_repeat_interleave(copies)
    return new


def join(caches: Sequence[SparseKCache]) -> SparseKCache:
    """The rows of several caches of one model side by side, in order; a copy.

    Rows may have read different numbers of tokens: each goes on at its own position, which
    `positions_of` gives.

    Raises:
        SparsekError: their budgets differ, or one is empty.
    """
    first = caches[0]
    for cache in caches:
        if cache.batch_size < 0:
            raise SparsekError("an empty cache has no rows", hint="read a prompt into it first")
        _check_slots(cache)
        if [layer.budget for layer in cache.layers] != [layer.budget for layer in first.layers]:
            raise SparsekError(
                "the caches were made for different budgets", hint="join those of one model"
            )
    whole = object.__new__(type(first))
    columns = zip(*(cache.layers for cache in caches), strict=True)
    Cache.__init__(whole, layers=[_joined(column) for column in columns])
    return whole


def rows(cache: SparseKCache) -> list[SparseKCache]:
    """A cache for each row, that continues where the row stands; copies.

    Raises:
        SparsekError: its model has other layers beside SparseK's.
    """
    _check_slots(cache)
    return [_row(cache, row, seen) for row, seen in enumerate(positions_of(cache).tolist())]


def _check_slots(cache: SparseKCache) -> None:
    if not cache.all_slots:
        raise SparsekError(
            "caches of models with other layers beside SparseK's cannot be joined or taken apart",
            hint="read the prompts as one batch, padded on the left",
        )


def _joined(layers: Sequence[SparseKCacheLayer]) -> SparseKCacheLayer:
    new = SparseKCacheLayer(layers[0].budget)
    new.state = type(layers[0].state).cat([layer.state for layer in layers])
    new.tokens_seen = max(layer.tokens_seen for layer in layers)
    return new


def positions_of(cache: SparseKCache) -> torch.Tensor:
    """Position of each row's next token, int64 [B]: the tokens it has read, without padding."""
    return cache.layers[0].state.seen.clone()


class DecodingBatch:
    """Rows that write greedily side by side; each joins and leaves without touching the others.

    One decoding step serves all rows, as one CUDA graph where there can be one, whatever their
    positions are and whoever is there: what continuous batching needs.

    Args:
        model: a causal LM with SparseK attention, in eval mode.
        rows: how many sequences fit.
    """

    def __init__(self, model: Any, rows: int):
        self.model, self.rows = model, rows
        self._decoder = Decoder(model, rows, pick=likeliest)
        self._cache: SparseKCache | None = None
        self._positions = torch.zeros(rows, dtype=torch.int64, device=model.device)
        self._words = torch.zeros_like(self._positions)
        self._taken = [False] * rows

    @property
    def free(self) -> int:
        """Rows that nobody has taken."""
        return self._taken.count(False)

    def join(self, cache: SparseKCache, word: int) -> int:
        """Takes a row for the sequence of `cache` (batch 1, copied), which goes on with `word`.

        Returns:
            The row's number, by which `step` names it until it leaves.

        Raises:
            SparsekError: no row is free, or the cache does not hold one sequence, or not in slots
                alone.
        """
        _check_slots(cache)
        if cache.batch_size != 1:
            raise SparsekError(
                f"the cache holds {max(cache.batch_size, 0)} sequences",
                hint="one joins at a time: batch_select_indices picks a row",
            )
        if not self.free:
            raise SparsekError(f"all {self.rows} rows are taken", hint="let one leave first")
        row = self._taken.index(False)
        if self._cache is None:
            self._cache = fork(cache, self.rows)
        for mine, theirs in zip(self._cache.layers, cache.layers, strict=True):
            mine.state.put_row(row, theirs.state)
            mine.tokens_seen = max(mine.tokens_seen, theirs.tokens_seen)
        self._positions[row] = positions_of(cache)[0]
        self._words[row] = word
        self._taken[row] = True
        return row

    def leave(self, row: int) -> SparseKCache:
        """Gives the row back; its sequence goes on in the cache returned (batch 1).

        The cache holds all that was written but the last token.

        Raises:
            SparsekError: nobody has that row.
        """
        if not 0 <= row < self.rows or not self._taken[row]:
            raise SparsekError(f"row {row} is not taken", hint="join gives a row's number")
        self._taken[row] = False
        return _row(self._cache, row, int(positions_of(self._cache)[row]))

    def step(self, count: int = 1) -> dict[int, list[int]]:
        """The next `count` tokens of every taken row, by its number.

        Raises:
            SparsekError: not all of them have a place among the model's learned positions; nothing
                was written.
        """
        if self._cache is None or self.free == self.rows:
            return {}
        taken = torch.tensor(self._taken, device=self._positions.device).long()
        # A free row stays where the table of positions has a place for it.
        self._positions.mul_(taken)
        Room(self.model, self._positions).take(count)
        written = []
        decoder = self._decoder
        with decoder.over(self._cache, self._positions, advance=taken, own=True):
            decoder.words.copy_(self._words)
            for _ in range(count):
                decoder.step()
                written.append(decoder.words.clone())
            self._words.copy_(decoder.words)
        self._positions.add_(count * taken)
        columns = torch.stack(written, dim=1).tolist()
        return {row: columns[row] for row in range(self.rows) if self._taken[row]}


def _row(cache: SparseKCache, row: int, seen: int) -> SparseKCache:
    only = torch.tensor([row], device=cache.layers[0].state.seen.device)
    alone = object.__new__(type(cache))
    Cache.__init__(alone, layers=[SparseKCacheLayer(layer.budget) for layer in cache.layers])
    for new, layer in zip(alone.layers, cache.layers, strict=True):
        new.state = layer.state.index_select(only)
        new.tokens_seen = seen
    return alone
