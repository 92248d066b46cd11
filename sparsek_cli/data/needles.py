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
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from sparsek_cli.data.facts import Fact, Words, draw_facts
from sparsek_cli.data.filler import Filler, encode
from sparsek_cli.data.phrasings import PHRASINGS, Phrasing
from sparsek_cli.errors import UsageError


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


class DocumentTooShort(UsageError, ValueError):
    """Facts need more tokens than the document has."""


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
        subject = "1 hidden fact does" if needles == 1 else f"{needles} hidden facts do"
        raise DocumentTooShort(
            f"{subject} not fit into {tokens} tokens",
            hint="ask for longer documents or fewer facts: of some tokenizers each letter is one "
            "token",
        )
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
        same_kind = [
            row for row in phrasings if row.key == model.phrasing.key and row is not model.phrasing
        ]
        if number % 2 and same_kind:
            row = same_kind[int(rng.integers(len(same_kind)))]
            clash = any(f.key == model.key and f.phrasing is row for f in [*facts, *others])
            if not clash:
                [other] = draw_facts(rng, [row], 1, words, taken=[*facts, *others])
                fact = replace(other, key=model.key)
        others.append(replace(fact, depth=float(rng.random())))
    return others
