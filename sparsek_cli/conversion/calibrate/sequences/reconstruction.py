"""Reconstruction: documents told again from their own text, so that all of it is looked up once.

A context is read, and then told once more from its own text, a part at a time (reconstruction;
the idea of KVzip, arXiv 2505.23416). Nothing is asked and no wording of ours decides what matters:
every token of the context is needed once, by the heads that look things up. Each part is a turn of
its own that goes on from the end of the context, as a reader's question would.

Numbers and codes stand in the text now and then. Of them each token has to be kept, while much of a
sentence follows from its beginning: text told again hardly shows what it costs to lose a name.
"""

from typing import Any

import numpy as np

from sparsek_cli.conversion.calibrate.sequences.sequence import Sequence, plain_text
from sparsek_cli.data.chat_format import ChatFormat
from sparsek_cli.data.facts import draw_code
from sparsek_cli.data.filler import Filler, encode
from sparsek_cli.errors import SparsekError

# A context is told again in at least this many turns, each of at most so many tokens. Turns are
# short beside it: a head that holds nearly a whole document, and forgets the oldest tokens first,
# loses none of them before they are told if much of the length comes after the context.
_PARTS = 16
LONGEST = 1024
# Shorter turns would be all request; a short document is told in fewer, of an eighth of it.
_SHORTEST = 128
# The first tokens of a turn could be any of the text; they are not counted.
_LEAD = 8
# For so many tokens of a context there is one number or code, which nothing but itself tells.
_TOKENS_PER_CODE = 400
_REQUEST = "\n\nRepeat the previous context exactly."


def retold(
    rng: np.random.Generator,
    filler: Filler,
    chat: ChatFormat | None,
    length: int,
    tokenizer: Any,
    turns: int | None = None,
    longest: int = LONGEST,
) -> Sequence:
    """A context and turns that tell it again; context and one turn are `length` tokens together.

    Args:
        chat: in this chat format, as the assistant's reply to the request to repeat, where that
            leaves room; None: as text that simply comes again.
        turns: how many parts are told again, the first one and others drawn; None: all.
        longest: most tokens of a turn.

    Raises:
        SparsekError: no room to tell anything again.
    """
    size = min(longest, max(length // _PARTS, min(length // 8, _SHORTEST)))
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    asking, request = encode(tokenizer, ["\n\n", _REQUEST])
    if chat is not None and len(request) + len(chat.reply) < size // 2:
        start, asking = list(chat.start), [*request, *chat.reply]
    told = size - len(asking)
    room = length - size - len(start)
    if told <= 2 * _LEAD or room < told:
        raise SparsekError(
            f"calibration documents of {length} tokens are too short to be told again",
            hint="give a larger --calibrate-length, or --calibrate none",
        )
    text, coded = _with_codes(rng, plain_text(rng, filler, room), tokenizer)
    parts = np.arange(room // told)
    if turns is not None and turns < len(parts):
        parts = np.sort(np.append(rng.permutation(parts[1:])[: turns - 1], 0))
    ids, answer, asked = [np.append(start, text)], [], []
    for part in parts:
        ids.append(np.append(asking, text[part * told : (part + 1) * told]))
        known = np.arange(size) >= len(asking) + _LEAD
        # A row is marked when the token that it predicts, the next one, has been read before.
        answer.append(np.append(known[1:], False))
        asked.append(~answer[-1])
    nowhere = np.zeros(len(start) + room, dtype=bool)
    # Rows that predict what nobody can foresee say nothing of text.
    unforeseen = nowhere.copy()
    unforeseen[len(start) - 1 + np.flatnonzero(coded)] = True
    known_again = nowhere.copy()
    for part in parts:
        first = len(start) + part * told
        known_again[first + _LEAD : first + told] = True
    return Sequence(
        np.concatenate(ids).astype(np.int64),
        np.concatenate([nowhere, *answer]),
        np.concatenate([unforeseen, *asked]),
        turns=len(parts),
        turn_length=size,
        told=known_again,
    )


def _with_codes(
    rng: np.random.Generator, text: np.ndarray, tokenizer: Any
) -> tuple[np.ndarray, np.ndarray]:
    """As many tokens of the text with numbers and codes in between, and which tokens are theirs."""
    count = len(text) // _TOKENS_PER_CODE
    codes = encode(tokenizer, [f" {draw_code(rng)}" for _ in range(count)]) if count else []
    pieces, ours, taken = [], [], 0
    for place, code in zip(np.sort(rng.integers(1, len(text), count)), codes, strict=True):
        pieces += [text[taken:place], code]
        ours += [np.zeros(place - taken, dtype=bool), np.ones(len(code), dtype=bool)]
        taken = place
    pieces.append(text[taken:])
    ours.append(np.zeros(len(text) - taken, dtype=bool))
    return np.concatenate(pieces)[: len(text)], np.concatenate(ours)[: len(text)]
