"""English sentences made from word lists: filler text for machines that hold no novels.

The offline fallback of the recall task, and a small part of tiny's training, so that such text is
not strange to it.
"""

from __future__ import annotations

import numpy as np

from sparsek_cli.data import vocabulary

_PEOPLE = (
    "miller", "baker", "teacher", "farmer", "widow", "clerk", "doctor", "painter", "child", "judge",
    "captain", "nurse", "gardener", "weaver", "traveller", "porter", "shepherd", "neighbour",
)  # fmt: skip
_MOVES = ("looked", "walked", "rode", "wandered", "drove", "hurried", "travelled", "returned")
_MANNERS = ("slowly", "quietly", "gladly", "at once", "without a word", "in silence", "as usual")
_TIMES = (
    "in the morning", "before noon", "late at night", "after dinner", "on Sunday", "in the autumn",
    "at dawn", "that evening", "the next day", "for a whole week", "many years ago", "in winter",
)  # fmt: skip
_SENTENCES = (
    "The {who} {moved} towards {place} {when}.",
    "Nobody in {place} had seen such a {look} {noun} before.",
    "There was some {noun} on the table, and beside it lay the {other}.",
    "It rained {when}, and the {who} stayed at home.",
    "The road to {place} was long, and the {noun} was heavy.",
    "They talked about the {noun} and the {other} until it grew dark.",
    "Every {who} in {place} remembers the story of the {noun}.",
    "The {who} bought the {look} {noun} and sold it again {when}.",
    "From the window one could see the {noun}, the {other} and the {look} wall.",
    "Then the {who} {moved} past the church and {how} went home.",
    "The old {who} spoke {how} of the days when {place} had no {noun}.",
    "Who would have thought that the {noun} could be so {look}?",
    "The {who} and the {other} were never seen together {when}.",
    "A letter from {place} arrived {when}, but it said nothing of the {noun}.",
    "The {look} {noun} belonged to the {who}, and the {other} to somebody else.",
    "“Give me the {noun},” said the {who}, “and I shall give you the {other}.”",
)  # fmt: skip


def generated_text(rng: np.random.Generator, sentences: int) -> str:
    """`sentences` sentences, joined by spaces: about 13 tokens each."""

    parts = {
        "who": _PEOPLE,
        "moved": _MOVES,
        "how": _MANNERS,
        "when": _TIMES,
        "place": vocabulary.PLACES,
        "look": vocabulary.MATERIALS,
        "noun": vocabulary.NOUNS,
        "other": vocabulary.NOUNS,
    }
    lists = (_SENTENCES, *parts.values())
    # All at once: one by one, drawing took longer than everything else.
    drawn = rng.integers([len(words) for words in lists] * sentences).reshape(sentences, len(lists))
    made = []
    for numbers in drawn.tolist():
        sentence, *chosen = (words[i] for words, i in zip(lists, numbers, strict=True))
        made.append(sentence.format(**dict(zip(parts, chosen, strict=True))))
    return " ".join(made)
