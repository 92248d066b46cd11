"""Questions about hidden facts as token ids, answer included: what recall is measured with.

The same documents and questions as the `recall` tasks of `sparsek evaluate`, ready for one batched
forward pass: an answer is right when each of its tokens is the most likely one, which is what
greedy decoding would write.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sparsek_cli.data.chat_format import ChatFormat
from sparsek_cli.data.facts import Fact
from sparsek_cli.data.filler import Filler, encode
from sparsek_cli.data.needles import make_document
from sparsek_cli.data.phrasings import Phrasing

ROOM = 112  # tokens kept free for the question, the chat template and the answer


@dataclass(frozen=True)
class Question:
    """A document, one question about it and the right answer.

    Attributes:
        ids: [n] int64: document, question, answer and the token that ends it.
        start: where the answer begins in `ids`.
        fact: what is asked for.
    """

    ids: np.ndarray
    start: int
    fact: Fact


def make_questions(
    seed: Sequence[int],
    filler: Filler,
    *,
    length: int,
    needles: int,
    count: int,
    phrasings: Sequence[Phrasing],
) -> list[Question]:
    """`count` questions about documents with `needles` facts each, all facts of a document in turn.

    Args:
        seed: of everything random.
        filler: text that facts are hidden in; its tokenizer has a chat template.
        length: most tokens of document, question and answer.

    Raises:
        ValueError: no chat template, or too few tokens for so many facts.
    """
    chat = ChatFormat.of(filler.tokenizer)
    if length < 2 * ROOM:
        raise ValueError(f"{length} tokens are too few for a document and a question")
    made: list[Question] = []
    number = 0
    while len(made) < count:
        rng = np.random.default_rng([*seed, length, needles, number])
        made += _about_one(rng, filler, chat, length - ROOM, needles, phrasings)
        number += 1
    return made[:count]


def _about_one(
    rng: np.random.Generator,
    filler: Filler,
    chat: ChatFormat,
    tokens: int,
    needles: int,
    phrasings: Sequence[Phrasing],
) -> Iterator[Question]:
    document = make_document(rng, filler, tokens=tokens, needles=needles, phrasings=phrasings)
    for which in rng.permutation(len(document.facts)):
        fact = document.facts[which]
        question, answer = encode(filler.tokenizer, ["\n\n" + fact.question, fact.answer])
        before = [*chat.start, *document.ids.tolist(), *question, *chat.reply]
        ids = np.asarray([*before, *answer, *chat.stop[:1]], dtype=np.int64)
        yield Question(ids, len(before), fact)
