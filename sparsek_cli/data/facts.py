"""Facts that can be hidden and asked for: who or what, the value, and the words around them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from sparsek_cli.data import vocabulary
from sparsek_cli.data.phrasings import Phrasing


@dataclass(frozen=True)
class Fact:
    """One hidden fact.

    Attributes:
        phrasing: how it is told and asked.
        key: who or what it is about.
        value: the expected answer: one word or one number.
        depth: where it stands in its document, 0 (start) to 1 (end).
    """

    phrasing: Phrasing
    key: str
    value: str
    depth: float = 0.0

    @property
    def statement(self) -> str:
        return self.phrasing.statement.format(key=self.key, value=self.value)

    @property
    def question(self) -> str:
        return self.phrasing.question.format(key=self.key)

    @property
    def answer(self) -> str:
        return self.phrasing.answer.format(value=self.value)

    @property
    def expected(self) -> str:
        return self.value


@dataclass(frozen=True)
class Words:
    """Words from outside the fixed lists, so that training does not end at their edge.

    Attributes:
        plain: lower-case words that may stand in for nouns.
        names: capitalised words that may stand in for names of people and places.
        share: probability of taking one of these.
        codes: probability that a value is none of a list's, nor a short number, but a long number
            or a code: many tokens of which each has to be kept.
    """

    plain: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    share: float = 0.0
    codes: float = 0.0

    @classmethod
    def from_text(cls, text: str, *, share: float, limit: int = 30_000) -> Words:
        """The distinct words of `text`, at most `limit` of each kind, in alphabetical order."""
        plain = sorted(set(re.findall(r"(?<= )[a-z]{3,11}(?=[ .,;])", text)))
        names = sorted(set(re.findall(r"(?<=[a-z] )[A-Z][a-z]{2,10}(?=[ .,;])", text)))

        def thin(words: list[str]) -> tuple[str, ...]:
            return tuple(words[:: max(1, -(-len(words) // limit))])

        return cls(plain=thin(plain), names=thin(names), share=share)


def draw_fact(rng: np.random.Generator, phrasing: Phrasing, words: Words | None = None) -> Fact:
    """A fact with a random key and value, from the fixed lists or now and then from `words`."""
    words = words or Words()
    return Fact(phrasing, _draw_key(rng, phrasing, words), _draw_value(rng, phrasing, words))


def draw_facts(
    rng: np.random.Generator,
    phrasings: Sequence[Phrasing],
    count: int,
    words: Words | None = None,
    taken: Iterable[Fact] = (),
) -> list[Fact]:
    """`count` facts with distinct keys and distinct values, phrasings taken in turn, shuffled.

    Fewer where the phrasings' word lists have no more to give.
    """
    if not phrasings:
        raise ValueError("no phrasing to draw facts from")
    keys = {fact.key for fact in taken}
    values = {fact.value for fact in taken}
    order = [phrasings[i] for i in rng.permutation(len(phrasings))]
    facts: list[Fact] = []
    for attempt in range(100 * count):
        if len(facts) == count:
            break
        fact = draw_fact(rng, order[(len(facts) + attempt // 50) % len(order)], words)
        if fact.key in keys or fact.value in values:
            continue
        keys.add(fact.key)
        values.add(fact.value)
        facts.append(fact)
    return [facts[i] for i in rng.permutation(len(facts))]


def _draw_key(rng: np.random.Generator, phrasing: Phrasing, words: Words) -> str:
    outside = bool(words.names) and rng.random() < words.share
    if phrasing.key == "person":
        first = _pick(rng, words.names if outside else vocabulary.FIRST_NAMES)
        if rng.random() < 0.2:
            return first
        return f"{first} {_pick(rng, words.names if outside else vocabulary.LAST_NAMES)}"
    if phrasing.key == "place":
        return _pick(rng, words.names if outside else vocabulary.PLACES)
    return f"{_pick(rng, vocabulary.MATERIALS)} {_pick(rng, vocabulary.CONTAINERS)}"


def _draw_value(rng: np.random.Generator, phrasing: Phrasing, words: Words) -> str:
    if words.codes and rng.random() < words.codes:
        return draw_code(rng)
    if phrasing.value == "number":
        return str(int(rng.integers(100, 10 ** int(rng.integers(3, 6)))))
    if words.plain and rng.random() < words.share:
        return _pick(rng, words.plain)
    return _pick(rng, vocabulary.NOUNS)


def draw_code(rng: np.random.Generator) -> str:
    """A number of 6 to 10 digits, or up to five groups of letters and digits."""
    if rng.random() < 0.5:
        return str(int(rng.integers(10**5, 10 ** int(rng.integers(6, 11)))))
    letters = "0123456789abcdef" if rng.random() < 0.5 else "0123456789ABCDEFGHJKLMNPQRSTUVWXYZ"
    groups = (
        "".join(letters[i] for i in rng.integers(len(letters), size=int(rng.integers(4, 9))))
        for _ in range(int(rng.integers(1, 6)))
    )
    return "-".join(groups)


def _pick(rng: np.random.Generator, words: Sequence[str]) -> str:
    return words[int(rng.integers(len(words)))]
