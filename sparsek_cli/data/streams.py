"""Synthetic sequences that are not text, with dependencies over long distances.

Both are generated, so that any length and any amount of data is at hand. Most of a stream is
background that its neighbourhood foretells. Now and then a tag of one of several channels comes,
or a signal of one; what follows a signal is settled by the newest tag of its channel, however long
ago that was, and counts as ANSWER. Channels are many, so that answers to one are far apart too.

    nucleotides  codons by a fixed Markov chain; signals AxG, tags Gx*, answers: reverse complements
    series       256 levels of a noisy quantity; after a drop-out: its newest set point again
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsek_cli.data import ANSWER, IGNORED, TEXT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END = "<|end|>"
_CODONS = tuple("".join(codon) for codon in product("ACGT", repeat=3))


class _Stream(ABC):
    """Tags, signals and answers laid over a background; each channel begins with a tag.

    Args:
        tags: mean number of symbols from one tag to the next, of all channels together.
        signals: the same for signals.

    Attributes:
        words: the symbols. signals_of: the signal of each channel.
        tags_of: [channels] the tags of each channel.
    """

    words: tuple[str, ...]
    signals_of: tuple[int, ...]
    tags_of: tuple[tuple[int, ...], ...]

    def __init__(self, tags: float = 150.0, signals: float = 60.0):
        self.tags, self.signals = tags, signals

    def __call__(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        """`length` symbols by number and their roles."""
        ids = self._background(rng, length)
        roles = np.full(length, TEXT, dtype=np.int8)
        newest: dict[int, int] = {}
        place, draws = 0, rng.random(length)
        while place < length:
            channel = int(rng.integers(len(self.signals_of)))
            if len(newest) < len(self.signals_of):
                channel = len(newest)
            if channel not in newest or draws[place] < 1 / self.tags:
                tags = self.tags_of[channel]
                ids[place] = newest[channel] = tags[int(rng.integers(len(tags)))]
                roles[place] = IGNORED
            elif draws[place] < 1 / self.tags + 1 / self.signals and place + 1 < length:
                ids[place : place + 2] = self.signals_of[channel], self._answer(newest[channel])
                roles[place : place + 2] = IGNORED, ANSWER
                place += 1
            place += 1
        return ids, roles

    @abstractmethod
    def _background(self, rng: np.random.Generator, length: int) -> np.ndarray:
        """`length` symbols that say nothing of the answers."""

    @abstractmethod
    def _answer(self, tag: int) -> int:
        """The symbol that follows a signal whose channel's newest tag is `tag`."""


class Nucleotides(_Stream):
    """Codons, 0 to 63, four channels of four tags; an answer is its tag's reverse complement."""

    words = _CODONS
    signals_of = tuple(_CODONS.index(f"A{letter}G") for letter in "ACGT")
    tags_of = tuple(
        tuple(_CODONS.index(f"G{letter}{last}") for last in "ACGT") for letter in "ACGT"
    )

    def __init__(self, **options: Any):
        super().__init__(**options)
        # One genome's habits for all sequences: which codon tends to follow which.
        rare = {*self.signals_of, *(tag for tags in self.tags_of for tag in tags)}
        common = [i for i in range(64) if i not in rare]
        table = np.zeros((64, 64))
        table[:, common] = np.random.default_rng(64).dirichlet(np.full(len(common), 0.15), 64)
        self._chain = np.cumsum(table, axis=1)

    def _background(self, rng: np.random.Generator, length: int) -> np.ndarray:
        codons = np.empty(length, dtype=np.int64)
        state = 0
        for place, draw in enumerate(rng.random(length)):
            state = min(int(np.searchsorted(self._chain[state], draw)), 63)
            codons[place] = state
        return codons

    def _answer(self, tag: int) -> int:
        pairs = str.maketrans("ACGT", "TGCA")
        return _CODONS.index(_CODONS[tag][::-1].translate(pairs))


class Series(_Stream):
    """Levels 0 to 255: a quantity between 20 and 150, eight kinds of drop-out below it (signals),
    and above it eight set points of each kind (tags), which are also the answers."""

    words = tuple(str(level) for level in range(256))
    signals_of = tuple(range(8))
    tags_of = tuple(tuple(range(160 + 8 * kind, 168 + 8 * kind)) for kind in range(8))

    def _background(self, rng: np.random.Generator, length: int) -> np.ndarray:
        levels = np.empty(length)
        level = 80.0
        for place, step in enumerate(rng.normal(0, 3, length)):
            level += 0.05 * (80 - level) + step
            levels[place] = level
        return np.clip(levels, 20, 150).astype(np.int64)

    def _answer(self, tag: int) -> int:
        return tag


STREAMS = {"nucleotides": Nucleotides, "series": Series}


def stream_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A word-level tokenizer for the symbols of a stream; ids are the symbols' numbers."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = STREAMS[name].words
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate((*words, END))}, END))
    if name == "nucleotides":
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[ACGT]{3}"), "isolated")
        tokenizer.decoder = decoders.Fuse()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def check_tokenizer(name: str, tokenizer: Any) -> None:
    """Raises ValueError unless the tokenizer's first ids are the symbols of the stream."""
    words = list(STREAMS[name].words)
    if tokenizer.convert_ids_to_tokens(list(range(min(len(words), len(tokenizer))))) != words:
        raise ValueError(f"the stream '{name}' needs `tokenizer: {name}`")
