"""The data source that teaches recall: hidden facts and questions, as token ids with roles.

Two kinds, both conversations in the tokenizer's own chat format:
- needle documents: facts hidden in filler text (`data/needles.py`), then questions in turns;
- key-value documents: nothing but facts and questions, many per sequence. A small model learns
  recall from these first, in short sequences; needles in long text alone taught it nothing.
Half of the key-value documents ask no question: they state the facts a second time, and the value
is to be known by then (induction in its plainest form).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sparsek_cli.data import ANSWER, IGNORED, TEXT
from sparsek_cli.data.chat_format import ChatFormat
from sparsek_cli.data.corpus import Corpus
from sparsek_cli.data.facts import Fact, Words, draw_facts
from sparsek_cli.data.filler import Filler, encode
from sparsek_cli.data.generated_text import generated_text
from sparsek_cli.data.needles import make_document
from sparsek_cli.data.phrasings import Phrasing, Split, phrasings

_BARE = Phrasing("bare", "person", "noun", "{key} {value}.", "{key}?")
_WORD_SAMPLE = 1_000_000  # tokens of the corpus that open words are taken from


class NeedleSource:
    """Makes conversations about hidden facts; called as a source of `sparsek_cli.data`.

    Args:
        tokenizer: fast, with a chat template.
        corpus: what facts are hidden in.
        key_values: share of calls that return key-value documents; the rest are needle documents.
        splits: phrasings to use, by split.
        needles: fewest and most facts hidden in a needle document.
        facts: fewest and most facts of a key-value document.
        questions: most questions about one needle document.
        documents: the needle documents of one call are 1 / documents of its length, with
            `documents` drawn from this list.
        distractors: share of needle documents with facts that nobody asks about.
        open_words: how often a key or value is a word from the filler and not from our lists.
        generated: share of needle documents whose filler is generated text.
        repeats: share of key-value documents that repeat the facts instead of asking.
    """

    def __init__(
        self,
        tokenizer: Any,
        corpus: Corpus,
        *,
        key_values: float = 0.0,
        splits: Sequence[Split] = ("calibration", "held_out"),
        needles: tuple[int, int] = (1, 32),
        facts: tuple[int, int] = (2, 12),
        questions: int = 24,
        documents: Sequence[int] = (1, 1, 2, 4),
        distractors: float = 0.3,
        open_words: float = 0.3,
        generated: float = 0.1,
        repeats: float = 0.5,
    ):
        self.tokenizer = tokenizer
        self.key_values = key_values
        self.phrasings = phrasings(*splits)
        self.needles = needles
        self.facts = facts
        self.questions = questions
        self.documents = tuple(documents)
        self.distractors = distractors
        self.generated = generated
        self.repeats = repeats
        self.chat = ChatFormat.of(tokenizer)
        self.filler = Filler.from_corpus(corpus, tokenizer)
        sample = tokenizer.decode(corpus.tokens[:_WORD_SAMPLE], skip_special_tokens=True)
        self.words = Words.from_text(sample, share=open_words)
        self._generated: Filler | None = None

    def __call__(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Conversations that fill `length` tokens: ids [length] and their roles [length]."""
        make = self._key_values if rng.random() < self.key_values else self._needles
        share = length // int(rng.choice(self.documents))
        rows: list[np.ndarray] = []
        roles: list[np.ndarray] = []
        have = 0
        while have < length:
            for piece, role in make(rng, min(share, length - have)):
                rows.append(np.asarray(piece, dtype=np.int64))
                roles.append(np.full(len(piece), role, dtype=np.int8))
                have += len(piece)
        return np.concatenate(rows)[:length], np.concatenate(roles)[:length]

    def _needles(self, rng: np.random.Generator, length: int) -> list[tuple[Any, int]]:
        """A needle document and its questions, within `length` tokens where that is possible."""
        low, high = self.needles
        # Log-uniform, so that single needles and crowds are both common; a fact and its question
        # take about 60 tokens, and at least two thirds of the document stay filler.
        high = max(low, min(high, length // 180))
        count = int(round(np.exp(rng.uniform(np.log(low), np.log(high + 0.49)))))
        asked = min(count, self.questions)
        extra = 0
        if rng.random() < self.distractors:
            extra = int(rng.integers(1, 2 + min(8, length // 256)))
        tokens = max(length - 50 * asked - 8, 64 + 40 * (count + extra))
        filler = self.filler if rng.random() >= self.generated else self._generated_filler()
        document = make_document(
            rng,
            filler,
            tokens=tokens,
            needles=count,
            phrasings=self.phrasings,
            distractors=extra,
            words=self.words,
        )
        roles = np.full(len(document.ids), TEXT, dtype=np.int8)
        for first, last in document.statements:
            roles[first:last] = IGNORED
        pieces = [(self.chat.start, IGNORED), *_runs(document.ids, roles)]
        order = rng.permutation(len(document.facts))[:asked]
        return pieces + self._turns([document.facts[i] for i in order])

    def _key_values(self, rng: np.random.Generator, room: int) -> list[tuple[Any, int]]:
        """Facts only, then the same facts repeated or asked for until about `room` is full."""
        low, high = self.facts
        high = max(low, min(high, room // 40))
        count = int(rng.integers(low, high + 1))
        repeat = rng.random() < self.repeats
        few = int(rng.integers(1, 1 + len(self.phrasings)))
        rows = [self.phrasings[i] for i in rng.permutation(len(self.phrasings))[:few]]
        if repeat and rng.random() < 0.4:
            rows = [_BARE]
        facts = draw_facts(rng, rows, count, self.words)
        count = len(facts)  # fewer where one phrasing has run out of names
        told = " ".join(fact.statement for fact in facts)
        start = encode(self.tokenizer, [told])[0]
        pieces: list[tuple[Any, int]] = [(self.chat.start, IGNORED), (start, IGNORED)]
        left = room - len(start)
        rounds = max(1, round(left / (count * (16 if repeat else 34))))
        again = [facts[i] for _ in range(rounds) for i in rng.permutation(count)]
        return pieces + (self._repeats(again) if repeat else self._turns(again))

    def _repeats(self, facts: Sequence[Fact]) -> list[tuple[Any, int]]:
        """Statements told again: the value counts as an answer, the words around it for nothing."""
        texts: list[str] = []
        for fact in facts:
            before, after = fact.phrasing.statement.split(" {value}")
            texts += [
                " " + before.format(key=fact.key),
                " " + fact.value,
                after.format(key=fact.key),
            ]
        roles = (IGNORED, ANSWER, IGNORED)
        rows = encode(self.tokenizer, texts)
        return [(row, roles[i % 3]) for i, row in enumerate(rows)]

    def _turns(self, facts: Sequence[Fact]) -> list[tuple[Any, int]]:
        """Question and answer per fact, a turn for each; the first question ends the document."""
        texts: list[str] = []
        for number, fact in enumerate(facts):
            texts += [("" if number else "\n\n") + fact.question, fact.answer]
        rows = encode(self.tokenizer, texts)
        pieces: list[tuple[Any, int]] = []
        for question, answer in zip(rows[::2], rows[1::2], strict=True):
            if pieces:
                pieces.append((self.chat.turn, IGNORED))
            pieces += [
                (question, IGNORED),
                (self.chat.reply, IGNORED),
                (answer, ANSWER),
                (self.chat.stop[:1], ANSWER),
                (self.chat.stop[1:], IGNORED),
            ]
        return pieces

    def _generated_filler(self) -> Filler:
        if self._generated is None:
            # A generator of its own: what a document holds must not depend on earlier calls.
            text = generated_text(np.random.default_rng(0), 4000)
            self._generated = Filler.from_documents([text], self.tokenizer)
        return self._generated


def _runs(ids: np.ndarray, roles: np.ndarray) -> list[tuple[np.ndarray, int]]:
    """Cut `ids` where the role changes."""
    cuts = np.flatnonzero(np.diff(roles)) + 1
    starts = [0, *cuts.tolist()]
    return [
        (piece, int(roles[start])) for start, piece in zip(starts, np.split(ids, cuts), strict=True)
    ]
