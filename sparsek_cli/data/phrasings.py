"""How a hidden fact is told and how it is asked for: one row per phrasing.

Statement and question share the key (who or what the fact is about) and little else, so that a
question cannot be answered by matching its words against the document. In some rows the value
stands before the key, which is harder: what tells facts apart comes after them. Answers have one
form for all phrasings (`ANSWER`): a short sentence in which the value follows a space, as it does
in the statement, and is the only thing to know.

`split` says who may look at a row:
    "calibration"  training of `tiny` and calibration of conversions
    "held_out"     training of `tiny`, never calibration
    "unseen"       neither: only evaluation
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Split = Literal["calibration", "held_out", "unseen"]
ANSWER = "It is {value}."


@dataclass(frozen=True)
class Phrasing:
    """One way to state a fact and to ask for it.

    Attributes:
        name: short, unique, used in results.
        key: what the fact is about: "person", "place" or "thing".
        value: "noun" (one lower-case word) or "number" (3 to 5 digits).
        statement: a sentence with `{key}` and `{value}`.
        question: a sentence with `{key}`.
        split: see the module docstring.
        answer: a sentence with `{value}`.
    """

    name: str
    key: Literal["person", "place", "thing"]
    value: Literal["noun", "number"]
    statement: str
    question: str
    split: Split = "calibration"
    answer: str = ANSWER


PHRASINGS: tuple[Phrasing, ...] = (
    Phrasing(
        "secret_word", "person", "noun",
        "The secret word of {key} is {value}.",
        "What does {key} tell nobody?",
    ),
    Phrasing(
        "present", "person", "noun",
        "On the last birthday {key} was given the {value} as a present.",
        "What did {key} receive?",
    ),
    Phrasing(
        "nickname", "person", "noun",
        "Among the sailors {key} was known as the {value}.",
        "What did the crew call {key}?",
    ),
    Phrasing(
        "password", "place", "noun",
        "Whoever wishes to enter {key} must whisper {value} to the guard.",
        "What is the password for {key}?",
    ),
    Phrasing(
        "inn", "place", "noun",
        "The only inn at {key} hangs out the sign of the {value}.",
        "Where does a traveller sleep in {key}?",
    ),
    Phrasing(
        "lock", "thing", "noun",
        "The {key} can be opened only by saying {value} aloud.",
        "How does one unlock the {key}?",
    ),
    Phrasing(
        "fear", "person", "noun",
        "It was the {value} that {key} feared above everything.",
        "What frightened {key} the most?",
    ),
    Phrasing(
        "room", "person", "number",
        "At the hotel {key} was staying in room {value}.",
        "On which door must one knock to find {key}?",
    ),
    Phrasing(
        "dream", "person", "noun",
        "Night after night {key} dreamed about the {value}.",
        "What came to {key} in sleep?",
        "held_out",
    ),
    Phrasing(
        "trade", "place", "noun",
        "The merchants of {key} have grown rich by selling {value}.",
        "Which goods are bought in {key}?",
        "held_out",
    ),
    Phrasing(
        "contents", "thing", "noun",
        "Inside the {key} lay the {value}, wrapped in old newspapers.",
        "What was found when they searched the {key}?",
        "held_out",
    ),
    Phrasing(
        "hidden", "thing", "noun",
        "They put the {value} into the {key} and turned away.",
        "What would a thief find in the {key}?",
        "held_out",
    ),
    Phrasing(
        "ledger", "place", "number",
        "The number of houses in {key} is exactly {value}.",
        "How many homes were counted in {key}?",
        "held_out",
    ),
    Phrasing(
        "horse", "person", "noun",
        "As for {key}, the name of the old horse was {value}.",
        "How is the animal of {key} called?",
        "unseen",
    ),
    Phrasing(
        "tower", "place", "noun",
        "High above {key}, on top of the tower, stands the {value}.",
        "What can be seen from far away in {key}?",
        "unseen",
    ),
    Phrasing(
        "lid", "thing", "noun",
        "Somebody had painted upon the {key} a picture of the {value}.",
        "With what was the {key} decorated?",
        "unseen",
    ),
)  # fmt: skip


def phrasings(*splits: Split) -> tuple[Phrasing, ...]:
    """The phrasings of the given splits, all of them when none is named."""
    return tuple(row for row in PHRASINGS if not splits or row.split in splits)
