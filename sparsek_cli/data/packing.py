"""Documents become fixed-length sequences that remember where each document begins."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from sparsek_cli.data import IGNORED, TEXT
from sparsek_cli.data.corpus import Corpus

SHORTEST = 16  # tokens; a document shorter than this teaches nothing, the rest becomes padding


@dataclass(frozen=True)
class PackedSequence:
    """One packed training sequence.

    Attributes:
        ids: [N] int64 token ids.
        roles: [N] int8, IGNORED, TEXT or ANSWER; IGNORED wherever a document begins.
        starts: positions at which a document begins; the first is 0.
    """

    ids: np.ndarray
    roles: np.ndarray
    starts: tuple[int, ...]


class PackedText:
    """Sequences of running text: each epoch covers every document once, in a new order."""

    def __init__(self, corpus: Corpus, length: int, seed: Sequence[int], role: int = TEXT):
        self.corpus, self.length, self.seed, self.role = corpus, length, seed, role
        self.per_epoch = max(1, corpus.total // length)
        # Bound per object, so that two corpora never share an order.
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k != "_epoch"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        rng = np.random.default_rng([*self.seed, epoch])
        order = rng.permutation(len(self.corpus))
        bounds = np.cumsum((self.corpus.ends - self.corpus.starts)[order])
        chunks = rng.permutation(self.per_epoch)
        # The tokens that no sequence covers are others in each epoch.
        phase = int(rng.integers(0, max(1, self.corpus.total - self.per_epoch * self.length + 1)))
        return order, bounds, chunks, phase

    def __call__(self, index: int) -> PackedSequence:
        """Sequence number `index` of an endless run; a pure function of (seed, index)."""
        order, bounds, chunks, phase = self._epoch(index // self.per_epoch)
        at = phase + int(chunks[index % self.per_epoch]) * self.length
        parts, starts, filled = [], [], 0
        document = int(np.searchsorted(bounds, at, side="right"))
        while filled < self.length:
            document %= len(order)  # a corpus shorter than one sequence repeats itself
            source = int(order[document])
            end = int(self.corpus.ends[source])
            skip = max(0, at - int(bounds[document] - (end - self.corpus.starts[source])))
            begin = int(self.corpus.starts[source]) + skip
            part = self.corpus.tokens[begin : min(end, begin + self.length - filled)]
            starts.append(filled)
            parts.append(part)
            filled += len(part)
            document, at = document + 1, 0
        ids = np.concatenate(parts).astype(np.int64)
        roles = np.full(self.length, self.role, dtype=np.int8)
        return _finished(ids, roles, starts)


class PackedDocuments:
    """Sequences filled with generated documents, one or several per sequence."""

    def __init__(
        self,
        source: Callable[[np.random.Generator, int], tuple[Sequence[int], Sequence[int]]],
        length: int,
        seed: Sequence[int],
        *,
        document_length: int | None = None,
        pad_id: int = 0,
    ):
        self.source, self.length, self.seed = source, length, seed
        self.document_length, self.pad_id = document_length or length, pad_id

    def __call__(self, index: int) -> PackedSequence:
        """Sequence number `index`; a pure function of (seed, index)."""
        rng = np.random.default_rng([*self.seed, index])
        ids = np.full(self.length, self.pad_id, dtype=np.int64)
        roles = np.full(self.length, IGNORED, dtype=np.int8)
        starts, filled = [], 0
        while self.length - filled >= min(SHORTEST, self.length):
            room = min(self.document_length, self.length - filled)
            document, kinds = self.source(rng, room)
            size = len(document)
            if not 0 < size <= room or len(kinds) != size:
                raise ValueError(
                    f"source returned {size} ids and {len(kinds)} roles for length {room}"
                )
            starts.append(filled)
            ids[filled : filled + size] = document
            roles[filled : filled + size] = kinds
            filled += size
            if self.document_length == self.length:
                break
        if filled < self.length:
            starts.append(filled)
        return _finished(ids, roles, starts)


def _finished(ids: np.ndarray, roles: np.ndarray, starts: list[int]) -> PackedSequence:
    # The first token of a document has nothing to be predicted from.
    roles[starts] = IGNORED
    return PackedSequence(ids, roles, tuple(starts))


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Sequences of one length become a batch.

    Returns:
        input_ids [B, N] int64; roles [B, N] int64; indices [B] int64. If any sequence holds more
        than one document also position_ids [B, N] int64, from 0 in each document, and
        cu_seq_lens [documents + 1] int32, their bounds in the batch laid out as one row of B x N.
    """
    import torch

    length = len(items[0]["input_ids"])
    batch = {
        "input_ids": torch.from_numpy(np.stack([item["input_ids"] for item in items])),
        "roles": torch.from_numpy(np.stack([item["roles"] for item in items])).long(),
        "indices": torch.tensor([item["index"] for item in items]),
    }
    if all(len(item["starts"]) == 1 for item in items):
        return batch
    bounds = [row * length + s for row, item in enumerate(items) for s in item["starts"]]
    bounds.append(len(items) * length)
    sizes = np.diff(bounds)
    flat = np.arange(len(items) * length) - np.repeat(bounds[:-1], sizes)
    batch["position_ids"] = torch.from_numpy(flat.reshape(len(items), length))
    batch["cu_seq_lens"] = torch.tensor(bounds, dtype=torch.int32)
    return batch
