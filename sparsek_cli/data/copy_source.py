"""Documents that repeat a passage of themselves."""

import numpy as np

from sparsek_cli.data import ANSWER, IGNORED, TEXT
from sparsek_cli.data.corpus import Corpus

CUE = 4  # tokens of a repeated passage that cannot be foreseen


class CopySource:
    """Text in which one passage comes twice; all but the cue of the second is an ANSWER."""

    def __init__(self, corpus: Corpus, passage: tuple[int, int]):
        self.corpus, self.passage = corpus, passage

    def __call__(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        """One document of exactly `length` tokens and its roles."""
        longest = min(self.passage[1], length // 2)
        size = _between(rng, min(self.passage[0], longest), longest)
        first = _between(rng, 0, length - 2 * size)
        second = _between(rng, first + size, length - size)
        ids = self.corpus.slice(rng, length)
        roles = np.full(length, TEXT, dtype=np.int8)
        ids[second : second + size] = ids[first : first + size]
        roles[second : second + size] = ANSWER
        roles[second : second + min(CUE, size)] = IGNORED
        return ids, roles


def _between(rng: np.random.Generator, low: int, high: int) -> int:
    return int(rng.integers(low, high + 1))
