"""Documents with hidden facts (needles) in filler text, and questions about them.

Everything is deterministic in a `numpy.random.Generator`. What callers use:

    filler = Filler.from_documents(texts, tokenizer)  # texts: novels, or generated_text(rng, n)
    document = make_document(rng, filler, tokens=4096, needles=4, phrasings=phrasings())
    for fact in document.facts:                              # asked about; fact.depth in [0, 1]
        messages = chat_messages(document.text, fact.question)   # one user turn
        ... is_correct(reply, fact.expected)

`needle_source.py` makes training sequences of the same documents.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsek_cli.data import vocabulary
from sparsek_cli.data.phrasings import PHRASINGS, Phrasing

if TYPE_CHECKING:
    from sparsek_cli.data.corpus import Corpus

# The end of a sentence: closing punctuation and quotes, with a capital after the white space.
_SENTENCE_END = re.compile(
    r"(?<!\bMr)(?<!\bMrs)(?<!\bDr)(?<!\bSt)[.!?][\"”’')\]]*(?=\s+[\"“‘'(\[]?[A-Z])"
)
_ENCODE_BATCH = 20_000


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
    """

    plain: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    share: float = 0.0

    @classmethod
    def from_text(cls, text: str, *, share: float, limit: int = 30_000) -> Words:
        """The distinct words of `text`, at most `limit` of each kind, in alphabetical order."""
        plain = sorted(set(re.findall(r"(?<= )[a-z]{3,11}(?=[ .,;])", text)))
        names = sorted(set(re.findall(r"(?<=[a-z] )[A-Z][a-z]{2,10}(?=[ .,;])", text)))

        def thin(words: list[str]) -> tuple[str, ...]:
            return tuple(words[:: max(1, -(-len(words) // limit))])

        return cls(plain=thin(plain), names=thin(names), share=share)


@dataclass
class Filler:
    """Documents cut into sentences of token ids.

    Flat arrays, not lists of strings, so that forked data workers share the memory.

    Attributes:
        ids: [tokens] integers, all documents; may be a memory map.
        starts, ends: [sentences] int64, where each sentence (with the white space before it) lies.
        documents: [documents + 1] int64, where each document starts, in sentences.
        tokenizer: what the ids mean.
        text: the sentences joined, or "" where only ids are known: then text is decoded from ids,
            exact for byte-level tokenizers.
        characters: [sentences + 1] int64, where each sentence starts in `text`.
    """

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    documents: np.ndarray
    tokenizer: Any = field(repr=False)
    text: str = field(default="", repr=False)
    characters: np.ndarray | None = None

    @classmethod
    def from_documents(cls, texts: Iterable[str], tokenizer: Any) -> Filler:
        """Cut and tokenise `texts`; ValueError when they hold no text."""
        pieces: list[str] = []
        bounds = [0]
        for text in texts:
            pieces.extend(split_sentences(text))
            bounds.append(len(pieces))
        if not pieces:
            raise ValueError("the filler documents hold no text")
        rows: list[list[int]] = []
        for start in range(0, len(pieces), _ENCODE_BATCH):
            rows.extend(encode(tokenizer, pieces[start : start + _ENCODE_BATCH]))
        tokens = _starts(rows)
        return cls(
            ids=np.fromiter((i for row in rows for i in row), dtype=np.int32),
            starts=tokens[:-1],
            ends=tokens[1:],
            documents=np.unique(bounds).astype(np.int64),
            tokenizer=tokenizer,
            text="".join(pieces),
            characters=_starts(pieces),
        )

    @classmethod
    def from_corpus(cls, corpus: Corpus, tokenizer: Any) -> Filler:
        """The same from a tokenised corpus, without decoding it."""
        closes, opens = _sentence_marks(tokenizer)
        starts: list[np.ndarray] = []
        ends: list[np.ndarray] = []
        documents = [0]
        for begin, end in zip(corpus.starts.tolist(), corpus.ends.tolist(), strict=True):
            tokens = np.asarray(corpus.tokens[begin:end])
            if tokens[-1] == tokenizer.eos_token_id:
                tokens = tokens[:-1]
            cuts = np.flatnonzero(closes[tokens[:-1]] & opens[tokens[1:]]) + 1
            starts.append(begin + np.concatenate([[0], cuts]))
            ends.append(begin + np.concatenate([cuts, [len(tokens)]]))
            documents.append(documents[-1] + len(cuts) + 1)
        return cls(
            ids=corpus.tokens,
            starts=np.concatenate(starts).astype(np.int64),
            ends=np.concatenate(ends).astype(np.int64),
            documents=np.asarray(documents, dtype=np.int64),
            tokenizer=tokenizer,
        )

    def take(self, rng: np.random.Generator, tokens: int) -> np.ndarray:
        """Indices of consecutive sentences of one document, at most `tokens` tokens in all.

        Starts anywhere from which the document is long enough; a document shorter than that is
        gone through again from its start. At least one sentence.
        """
        begins, stops = self.starts[self.documents[:-1]], self.ends[self.documents[1:] - 1]
        room = np.maximum(stops - begins - tokens, 1).astype(np.float64)
        which = int(rng.choice(len(room), p=room / room.sum()))
        first, last = int(self.documents[which]), int(self.documents[which + 1])
        length = int(stops[which] - begins[which])
        if length > tokens:
            offset = int(begins[which]) + int(rng.integers(0, length - tokens))
            start = first + int(np.searchsorted(self.starts[first:last], offset, side="right")) - 1
            limit = self.starts[start] + tokens
            stop = first + int(np.searchsorted(self.ends[first:last], limit, side="right"))
            return np.arange(start, max(stop, start + 1))
        chosen = np.tile(np.arange(first, last), 1 + tokens // max(1, length))
        sizes = np.cumsum(self.ends[chosen] - self.starts[chosen])
        return chosen[: max(1, int(np.searchsorted(sizes, tokens, side="right")))]

    def sentence_text(self, index: int) -> str:
        if self.characters is None:
            return self.tokenizer.decode(self.sentence_ids(index))
        return self.text[self.characters[index] : self.characters[index + 1]]

    def sentence_ids(self, index: int) -> np.ndarray:
        return self.ids[self.starts[index] : self.ends[index]]


@dataclass(frozen=True)
class NeedleDocument:
    """A document with facts in it.

    Attributes:
        ids: its token ids, int64, equal to tokenising `text` for byte-level BPE tokenizers.
        facts: the facts asked about, in order of depth.
        distractors: further facts in the text that nobody asks about.
        statements: [facts + distractors] pairs (first, last + 1) of token positions in `ids`, in
            the order `facts`, then `distractors`.
        parts: what the text is joined from: strings, or filler sentences by number.
    """

    ids: np.ndarray
    facts: tuple[Fact, ...]
    distractors: tuple[Fact, ...]
    statements: tuple[tuple[int, int], ...]
    parts: tuple[str | int, ...] = field(repr=False)
    filler: Filler = field(repr=False)

    @cached_property
    def text(self) -> str:
        """The document, without white space at its start; made when first asked for."""
        return "".join(
            part if isinstance(part, str) else self.filler.sentence_text(part)
            for part in self.parts
        )


def split_sentences(text: str) -> list[str]:
    """`text` cut before the white space that follows a sentence; joined again it is `text`."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    cuts = [0, *ends, len(text)]
    return [text[a:b] for a, b in zip(cuts, cuts[1:], strict=False) if b > a]


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens."""
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]


def draw_fact(
    rng: np.random.Generator, phrasing: Phrasing, words: Words | None = None
) -> Fact:
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


def make_document(
    rng: np.random.Generator,
    filler: Filler,
    *,
    tokens: int,
    needles: int,
    phrasings: Sequence[Phrasing] = PHRASINGS,
    depths: Sequence[float] | None = None,
    distractors: int = 0,
    words: Words | None = None,
) -> NeedleDocument:
    """Filler text of about `tokens` tokens (never more) with `needles` facts at sentence bounds.

    Args:
        depths: where the asked facts stand, 0 to 1; uniformly random when not given.
        distractors: further facts: half with a phrasing that is also asked about and another key,
            half about an asked key with another phrasing of the same kind of key.
    """
    facts = draw_facts(rng, phrasings, needles, words)
    where = list(depths) if depths is not None else list(rng.random(len(facts)))
    if len(where) != len(facts):
        raise ValueError(f"{len(where)} depths for {needles} needles")
    facts = [replace(fact, depth=float(depth)) for fact, depth in zip(facts, where, strict=True)]
    facts.sort(key=lambda fact: fact.depth)
    others = _draw_distractors(rng, facts, phrasings, distractors, words)
    everything = facts + others
    rows = encode(filler.tokenizer, [" " + fact.statement for fact in everything])
    room = tokens - sum(len(row) for row in rows)
    if room < 1:
        raise ValueError(f"{needles} needles do not fit into {tokens} tokens")
    chosen = filler.take(rng, room)
    # The first sentence loses the white space before it, and so may have other tokens.
    opening = filler.sentence_text(int(chosen[0])).lstrip()
    parts: list[str | int] = [opening, *chosen[1:].tolist()]
    pieces = [np.asarray(encode(filler.tokenizer, [opening])[0])]
    pieces += [filler.sentence_ids(i) for i in chosen[1:]]
    # Never before the first sentence: statements are inserted with a space before them.
    slots = [1 + round(fact.depth * (len(chosen) - 1)) for fact in everything]
    order = sorted(range(len(slots)), key=lambda i: (slots[i], i))
    for which in reversed(order):
        parts.insert(slots[which], " " + everything[which].statement)
        pieces.insert(slots[which], np.asarray(rows[which]))
    ends = np.cumsum([len(piece) for piece in pieces])
    places = {which: slots[which] + rank for rank, which in enumerate(order)}
    return NeedleDocument(
        ids=np.concatenate(pieces).astype(np.int64),
        facts=tuple(facts),
        distractors=tuple(others),
        statements=tuple(
            (int(ends[places[i]]) - len(rows[i]), int(ends[places[i]])) for i in range(len(rows))
        ),
        parts=tuple(parts),
        filler=filler,
    )


def chat_messages(document: str, question: str) -> list[dict[str, str]]:
    """One user turn: document, blank line, question; so the document can be read first."""
    return [{"role": "user", "content": f"{document}\n\n{question}"}]


def plain_prompt(document: str, question: str) -> str:
    """The same question for a model without a chat template; the reply continues "It is"."""
    return f"{document}\n\nQuestion: {question}\nAnswer: It is"


def is_correct(answer: str, expected: str) -> bool:
    """Whether the first line of `answer` holds the expected word or number, whole, in any case."""
    lines = answer.strip().splitlines()
    return bool(lines) and bool(
        re.search(rf"(?<!\w){re.escape(expected)}(?!\w)", lines[0], flags=re.IGNORECASE)
    )


def _draw_distractors(
    rng: np.random.Generator,
    facts: Sequence[Fact],
    phrasings: Sequence[Phrasing],
    count: int,
    words: Words | None,
) -> list[Fact]:
    others: list[Fact] = []
    for number in range(count):
        model = facts[int(rng.integers(len(facts)))]
        [fact] = draw_facts(rng, [model.phrasing], 1, words, taken=[*facts, *others])
        same_kind = [row for row in phrasings
                     if row.key == model.phrasing.key and row is not model.phrasing]
        if number % 2 and same_kind:
            row = same_kind[int(rng.integers(len(same_kind)))]
            clash = any(f.key == model.key and f.phrasing is row for f in [*facts, *others])
            if not clash:
                [other] = draw_facts(rng, [row], 1, words, taken=[*facts, *others])
                fact = replace(other, key=model.key)
        others.append(replace(fact, depth=float(rng.random())))
    return others


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
    if phrasing.value == "number":
        return str(int(rng.integers(100, 10 ** int(rng.integers(3, 6)))))
    if words.plain and rng.random() < words.share:
        return _pick(rng, words.plain)
    return _pick(rng, vocabulary.NOUNS)


def _pick(rng: np.random.Generator, words: Sequence[str]) -> str:
    return words[int(rng.integers(len(words)))]


def _sentence_marks(tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Per token id: whether it may close a sentence, and whether it may open one. [V] bool each."""
    texts = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    closes = [re.search(r"[.!?][\"”’')\]]*$", text) is not None for text in texts]
    opens = [re.match(r"\s+([\"“‘'(\[]?[A-Z]|[\"“‘'(\[]?$)", text) is not None for text in texts]
    special = list(tokenizer.all_special_ids)
    closes, opens = np.asarray(closes), np.asarray(opens)
    closes[special] = opens[special] = False
    return closes, opens


def _starts(rows: Sequence[Any]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
