"""One sequence that calibration reads, and the plain text it is made of."""

from dataclasses import dataclass

import numpy as np

from sparsek_cli.data.filler import Filler


@dataclass(frozen=True)
class Sequence:
    """One calibration sequence.

    Attributes:
        ids: [N] int64 token ids.
        answer: [N] bool, rows whose next token stands far back in the text.
        asking: [N] bool, rows that are neither text nor answer: of questions up to the answer, of
            hidden facts, and those before a token that nobody could foresee.
        turns, turn_length: the last turns * turn_length tokens are that many turns, each of which
            goes on from the end of the context before them (see recorded.Recorded).
        told: [C] bool, tokens of the context that the turns tell again; None: the answers look
            wherever they like.
    """

    ids: np.ndarray
    answer: np.ndarray
    asking: np.ndarray
    turns: int = 0
    turn_length: int = 0
    told: np.ndarray | None = None

    @property
    def context(self) -> int:
        """Tokens before the turns."""
        return len(self.ids) - self.turns * self.turn_length

    @property
    def is_recall(self) -> bool:
        """Whether anything far back is asked for."""
        return bool(self.answer.any())

    def plain(self, most: int) -> list["Sequence"]:
        """The context with one turn each, at most `most` of them, spread; itself without turns."""
        if not self.turns:
            return [self]
        taken = np.unique(np.linspace(0, self.turns - 1, most).round().astype(int))
        return [self._with_turn(turn) for turn in taken]

    def _with_turn(self, turn: int) -> "Sequence":
        first = self.context + turn * self.turn_length
        kept = np.r_[: self.context, first : first + self.turn_length]
        return Sequence(self.ids[kept], self.answer[kept], self.asking[kept])


def plain_text(rng: np.random.Generator, filler: Filler, tokens: int) -> np.ndarray:
    """[tokens] int64 ids of running text, of as few documents as have so much."""
    ids: list[np.ndarray] = []
    while sum(map(len, ids)) < tokens:
        ids += [filler.sentence_ids(i) for i in filler.take(rng, tokens)]
    return np.concatenate(ids).astype(np.int64)[:tokens]
