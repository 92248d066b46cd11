"""Sequences that are not text: symbols in which something rare is needed again much later.

Both are generated, so that any length and any amount of data is at hand. Most of a stream is
background that its neighbourhood foretells. Rarely a tag comes; more often a signal, and what
follows a signal is settled by the newest tag, however long ago that was. It counts as ANSWER.

    nucleotides  codons by a fixed Markov chain; after ATG: the newest tag, reverse complement
    series       256 levels of a noisy quantity; after a drop-out: the newest set point again
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsek_cli.data import ANSWER, IGNORED, TEXT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END = "<|end|>"
_CODONS = tuple("".join(codon) for codon in product("ACGT", repeat=3))


class _Stream:
    """Tags, signals and answers laid over a background.

    Args:
        tags: mean number of symbols from one tag to the next.
        signals: the same for signals.
    """

    words: tuple[str, ...]
    signal: int

    def __init__(self, tags: float = 250.0, signals: float = 40.0):
        self.tags, self.signals = tags, signals

    def __call__(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        """`length` symbols by number and their roles."""
        ids = self._background(rng, length)
        roles = np.full(length, TEXT, dtype=np.int8)
        tag, place, draws = None, 0, rng.random(length)
        while place < length:
            if tag is None or draws[place] < 1 / self.tags:
                ids[place] = tag = self._draw_tag(rng)
                roles[place] = IGNORED
            elif draws[place] < 1 / self.tags + 1 / self.signals and place + 1 < length:
                ids[place], ids[place + 1] = self.signal, self._answer(tag)
                roles[place], roles[place + 1] = IGNORED, ANSWER
                place += 1
            place += 1
        return ids, roles

    def _background(self, rng: np.random.Generator, length: int) -> np.ndarray:
        raise NotImplementedError

    def _draw_tag(self, rng: np.random.Generator) -> int:
        raise NotImplementedError

    def _answer(self, tag: int) -> int:
        raise NotImplementedError


class Nucleotides(_Stream):
    """Codons, 0 to 63. Tags are the codons that begin with G."""

    words = _CODONS
    signal = _CODONS.index("ATG")
    _tags = tuple(i for i, codon in enumerate(_CODONS) if codon[0] == "G")

    def __init__(self, **options: Any):
        super().__init__(**options)
        # One genome's habits for all sequences: which codon tends to follow which.
        common = [i for i in range(64) if i not in self._tags and i != self.signal]
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

    def _draw_tag(self, rng: np.random.Generator) -> int:
        return self._tags[int(rng.integers(len(self._tags)))]

    def _answer(self, tag: int) -> int:
        pairs = str.maketrans("ACGT", "TGCA")
        return _CODONS.index(_CODONS[tag][::-1].translate(pairs))


class Series(_Stream):
    """Levels 0 to 255. The quantity stays between 20 and 150; set points are above, drop-outs 0."""

    words = tuple(str(level) for level in range(256))
    signal = 0

    def _background(self, rng: np.random.Generator, length: int) -> np.ndarray:
        levels = np.empty(length)
        level = 80.0
        for place, step in enumerate(rng.normal(0, 3, length)):
            level += 0.05 * (80 - level) + step
            levels[place] = level
        return np.clip(levels, 20, 150).astype(np.int64)

    def _draw_tag(self, rng: np.random.Generator) -> int:
        return 160 + 6 * int(rng.integers(16))

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
