"""Calibration text: plain text, and documents with questions about things far back.

Maps are fitted on text and documents in turn, and compared on longer documents. In a document
all of it is told again (reconstruction.py), or facts are hidden (only phrasings marked for
calibration) and told again or asked for at the end: the rows that predict what was read before are
marked, because they say which keys a query far away will need.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from sparsek_cli.conversion.calibrate.sequences.reconstruction import LONGEST, retold
from sparsek_cli.conversion.calibrate.sequences.sequence import Sequence, plain_text
from sparsek_cli.conversion.calibrate.sequences.texts import GENERATED_SENTENCES, calibration_texts
from sparsek_cli.data.chat_format import ChatFormat, TemplateFails
from sparsek_cli.data.facts import Fact, Words
from sparsek_cli.data.filler import Filler, encode
from sparsek_cli.data.generated_text import generated_text
from sparsek_cli.data.needles import make_document
from sparsek_cli.data.phrasings import phrasings
from sparsek_cli.errors import SparsekError

# Characters of text to read: what most tokenizers make of a token, with room to choose from.
_CHARACTERS_PER_TOKEN = 8
# The text is taken from this many documents, if there are as many and they are long enough.
_DOCUMENTS = 64
# Many facts: what a scorer learns of them grows with their number, not with the text around.
_MOST_NEEDLES = 40
_TOKENS_PER_NEEDLE = 160
_TOKENS_PER_QUESTION = 50
# So often a value is a long number or a code, of which every token counts.
_CODES = 0.12
# In documents to compare on, half of the facts stand here: what is furthest away is what a
# preference for the new loses first, and evenly spread facts hardly show it.
_EARLY = 0.1
# A repeated passage: recognisable after its first tokens, known from then on.
_PASSAGE = 64
_PASSAGE_LEAD = 8
_SHARE_WITH_PASSAGE = {"mixed": 0.5}
# This much of the facts is told again; the rest is asked for.
_SHARE_TOLD = {"statements": 1.0, "told_and_asked": 0.5}
# Kinds of documents that are made in turn; the first, on which parts are valued, has answers.
_IN_TURN = {
    "retold_and_asked": ("retold", "told_and_asked"),
    "text_and_asked": ("told_and_asked", "none"),
    "all_in_turn": ("told_and_asked", "none", "told_and_asked", "retold"),
}


def calibration_sequences(
    tokenizer: Any,
    spec: str,
    *,
    fitting: int,
    fit_length: int,
    held_out: int,
    lengths: tuple[int, ...],
    documents: str,
    seed: int,
    turns: int | None = None,
    longest: int = LONGEST,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[list[Sequence], list[Sequence]]:
    """Sequences to fit on, text and documents in turn, and documents to compare on.

    Args:
        tokenizer: fast tokenizer of the model.
        spec: "auto", a file, folder or glob, or a hub dataset.
        fitting, fit_length: how many to fit on, and their tokens.
        held_out, lengths: how many to compare on, and their tokens in turn: as long as what the
            model will read, because how steeply scores may prefer the new depends on it.
        documents: what they ask for, see `method.DOCUMENTS`; with none they are text.
        seed: everything random comes from it.
        turns, longest: parts of a retold document that are told again (None: all), and most
            tokens of each.
        say: told where the text is shorter than what is read of it.

    Raises:
        UsageError: the text named by `spec` is missing, empty or not UTF-8.
    """
    rng = np.random.default_rng(seed)
    characters = (fitting * fit_length + held_out * max(lengths)) * _CHARACTERS_PER_TOKEN
    most = max(characters // _DOCUMENTS, 2 * max(fit_length, *lengths) * _CHARACTERS_PER_TOKEN)
    filler = Filler.from_documents(calibration_texts(spec, characters, most), tokenizer)
    if spec != "auto" and len(filler.ids) < fitting * fit_length:
        say(
            f"'{spec}' holds {len(filler.ids):,} tokens, of {fitting * fit_length:,} to fit on: "
            "it is read again and again"
        )
    own = generated_text(rng, GENERATED_SENTENCES)  # drawn in any case: what follows depends on it

    @functools.cache
    def generated() -> Filler:
        return Filler.from_documents([own], tokenizer)

    chat = _format(tokenizer, say)

    def document(source: Filler, tokens: int, number: int, *, early: bool = False) -> Sequence:
        kinds = _IN_TURN.get(documents, (documents,))
        number, turn = divmod(number, len(kinds))
        asks = kinds[turn]
        if asks == "none":
            return _text(rng, source, tokens, tokenizer)
        if asks == "retold":
            # With the chat template and without one in turn, where there is one.
            own = chat if number % 2 == 0 and tokenizer.chat_template else None
            return retold(rng, source, own, tokens, tokenizer, turns, longest)
        return _recall(rng, source, chat, tokens, tokenizer, asks, early=early)

    made = []
    for number in range(fitting):
        if number % 2 == 0:
            made.append(_text(rng, filler, fit_length, tokenizer))
        else:
            # Some fillers are generated: facts then stand out less against a single style.
            source = generated() if spec == "auto" and number % 8 == 7 else filler
            made.append(document(source, fit_length, number // 2))
    compared = []
    for number in range(held_out):
        # Every length with the chat template and without one.
        length = lengths[(number + number // 2) % len(lengths)]
        compared.append(document(filler, length, number, early=True))
    return made, compared


def _format(tokenizer: Any, say: Callable[[str], Any]) -> ChatFormat:
    """The chat format, or plain questions and answers for a model without one that can be cut."""
    try:
        return ChatFormat.of(tokenizer)
    except (ValueError, TemplateFails) as error:
        if isinstance(error, TemplateFails):
            say(f"calibrating with plain questions: {error.message}")
        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        reply, stop, turn = encode(tokenizer, ["\nAnswer:", "\n", "\nQuestion:"])
        return ChatFormat(tuple(start), tuple(reply), tuple(stop), tuple(turn))


def _text(rng: np.random.Generator, filler: Filler, length: int, tokenizer: Any) -> Sequence:
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = np.append(start, plain_text(rng, filler, length - len(start))).astype(np.int64)
    nowhere = np.zeros(length, dtype=bool)
    return Sequence(ids, nowhere, nowhere)


def _recall(
    rng: np.random.Generator,
    filler: Filler,
    chat: ChatFormat,
    length: int,
    tokenizer: Any,
    documents: str,
    *,
    early: bool,
) -> Sequence:
    """A document, sometimes a passage of it again, and questions about its facts, or these again.

    With `early` half of the facts stand near its start.
    """
    most = max(1, min(_MOST_NEEDLES, length // _TOKENS_PER_NEEDLE))
    count = int(rng.integers((most + 1) // 2, most + 1))
    repeats = length >= 8 * _PASSAGE and rng.random() < _SHARE_WITH_PASSAGE.get(documents, 0)
    passage = _PASSAGE if repeats else 0
    room = length - _TOKENS_PER_QUESTION * count - len(chat.start) - passage - 8
    if room < length // 2:
        raise SparsekError(
            f"calibration sequences of {length} tokens are too short for a question",
            hint="give a larger --calibrate-length, or --calibrate none",
        )
    depths = rng.random(count)
    if early:
        depths[::2] *= _EARLY
    document = make_document(
        rng,
        filler,
        tokens=room,
        needles=count,
        phrasings=phrasings("calibration"),
        depths=depths.tolist(),
        words=Words(codes=_CODES),
    )
    ids: list[int] = [*chat.start, *document.ids.tolist()]
    known = [False] * len(ids)
    if passage:
        begin = len(chat.start) + int(rng.integers(0, len(document.ids) // 2))
        ids += ids[begin : begin + passage]
        known += [position >= _PASSAGE_LEAD for position in range(passage)]
    asked_from = len(ids)
    facts = [document.facts[i] for i in rng.permutation(count)]
    told = round(_SHARE_TOLD.get(documents, 0) * count)
    if early:
        # The oldest come last, when most has been read since: a head that forgets them must lose.
        parts = facts[:told], facts[told:]
        facts = [fact for part in parts for fact in sorted(part, key=lambda fact: -fact.depth)]
    for number in range(10 * length):
        if len(ids) > length:
            break
        fact = facts[number % count]
        if number < told or told == count:
            piece, marks = _again(tokenizer, fact, first=number == 0)
        else:
            piece, marks = _turn(tokenizer, chat, fact, first=number == told)
        ids += piece
        known += marks
    # A row is marked when the token it predicts, the next one, is known from far back.
    answer = np.asarray([*known[1 : length + 1], False][:length], dtype=bool)
    # What facts are told in is no text: sentences of one pattern foretell each other.
    ours = np.arange(length) >= asked_from
    for begin, end in document.statements:
        ours[len(chat.start) + begin - 1 : len(chat.start) + end - 1] = True
    asking = ours & ~answer
    return Sequence(np.asarray(ids[:length], dtype=np.int64), answer, asking)


def _turn(
    tokenizer: Any, chat: ChatFormat, fact: Fact, *, first: bool
) -> tuple[list[int], list[bool]]:
    """A question and its answer as ids, and which of them tell the fact, and where it ends.

    Where a value ends stands nowhere but behind it: without that pair `ox` goes on as `oxotism`.
    """
    before, after = fact.answer.split(f" {fact.value}")
    texts = [("\n\n" if first else "") + fact.question, before, f" {fact.value}", after]
    question, before_ids, value, after_ids = encode(tokenizer, texts)
    opening = [] if first else list(chat.turn)
    ids = [*opening, *question, *chat.reply, *before_ids, *value, *after_ids, *chat.stop]
    told = len(opening) + len(question) + len(chat.reply) + len(before_ids)
    marks = [told <= i <= told + len(value) for i in range(len(ids))]
    return ids, marks


def _again(tokenizer: Any, fact: Fact, *, first: bool) -> tuple[list[int], list[bool]]:
    """A fact told once more as ids, and which can be known: the later of key and value, its end."""
    statement = fact.statement
    later = max(fact.key, fact.value, key=statement.rindex)
    before, after = statement.rsplit(later, 1)
    space = " " if before.endswith(" ") else ""
    texts = [("\n\n" if first else " ") + before.rstrip(" "), space + later, after]
    before_ids, known, after_ids = encode(tokenizer, texts)
    ends = [number == 0 for number in range(len(after_ids))]
    marks = [False] * len(before_ids) + [True] * len(known) + ends
    return [*before_ids, *known, *after_ids], marks
