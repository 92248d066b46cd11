"""Calibration text: plain text, and documents with questions about things far back.

Maps are fitted on text and documents in turn, and compared on longer documents. In a document
facts are hidden (only phrasings marked for calibration) and asked for at the end, and a passage
may be repeated word for word: the rows that predict such answers are marked, because they say
which keys a query far away will need.
"""

import ast
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparsek_cli.data.generated_text import generated_text
from sparsek_cli.data.needle_source import ChatFormat
from sparsek_cli.data.needles import Fact, Filler, encode, make_document
from sparsek_cli.data.phrasings import phrasings
from sparsek_cli.data.text import iterate_texts
from sparsek_cli.errors import SparsekError, UsageError

# Characters of text to read: what most tokenizers make of a token, with room to choose from.
_CHARACTERS_PER_TOKEN = 8
_GENERATED_SENTENCES = 2000
# Many facts: what a scorer learns of them grows with their number, not with the text around.
_MOST_NEEDLES = 40
_TOKENS_PER_NEEDLE = 160
_TOKENS_PER_QUESTION = 50
# In documents to compare on, half of the facts stand here: what is furthest away is what a
# preference for the new loses first, and evenly spread facts hardly show it.
_EARLY = 0.1
# A repeated passage: recognisable after its first tokens, known from then on.
_PASSAGE = 64
_PASSAGE_LEAD = 8
_SHARE_WITH_PASSAGE = 0.5


@dataclass(frozen=True)
class Sequence:
    """One calibration sequence.

    Attributes:
        ids: [N] int64 token ids.
        answer: [N] bool, rows whose next token stands far back in the text.
        asking: [N] bool, the rows of questions up to the answer, which are neither text nor answer.
    """

    ids: np.ndarray
    answer: np.ndarray
    asking: np.ndarray

    @property
    def is_recall(self) -> bool:
        return bool(self.answer.any())


def calibration_sequences(
    tokenizer: Any,
    spec: str,
    *,
    fitting: int,
    fit_length: int,
    held_out: int,
    length: int,
    seed: int,
) -> tuple[list[Sequence], list[Sequence]]:
    """Sequences to fit on, text and documents in turn, and documents to compare on.

    Args:
        tokenizer: fast tokenizer of the model.
        spec: "auto", a file, folder or glob, or a hub dataset.
        fitting, fit_length: how many to fit on, and their tokens.
        held_out, length: how many to compare on, and their tokens: as long as what the model will
            read, because how steeply scores may prefer the new depends on it.
        seed: everything random comes from it.

    Raises:
        UsageError: the text named by `spec` is missing, empty or not UTF-8.
    """
    rng = np.random.default_rng(seed)
    characters = (fitting * fit_length + held_out * length) * _CHARACTERS_PER_TOKEN
    filler = Filler.from_documents(_texts(spec, characters), tokenizer)
    generated = Filler.from_documents([generated_text(rng, _GENERATED_SENTENCES)], tokenizer)
    chat = _format(tokenizer)
    made = []
    for number in range(fitting):
        if number % 2 == 0:
            made.append(_text(rng, filler, fit_length, tokenizer))
        else:
            # Some fillers are generated: facts then stand out less against a single style.
            source = generated if spec == "auto" and number % 8 == 7 else filler
            made.append(_recall(rng, source, chat, fit_length, tokenizer))
    compared = [
        _recall(rng, filler, chat, length, tokenizer, early=True) for _ in range(held_out)
    ]
    return made, compared


def _texts(spec: str, characters: int) -> Iterator[str]:
    """Documents of `spec` until there are enough characters."""
    documents = _library_prose() if spec == "auto" else iterate_texts(spec)
    taken = 0
    for text in documents:
        yield text
        taken += len(text)
        if taken >= characters:
            return
    if spec == "auto" and taken < characters:
        rng = np.random.default_rng(0)
        for _ in range(max(1, (characters - taken) // 100_000)):
            yield generated_text(rng, _GENERATED_SENTENCES)
    if not taken and spec != "auto":
        raise UsageError(f"no text in '{spec}'", hint="name a file with text, or use auto")


def _library_prose() -> Iterator[str]:
    """Docstrings of the Python standard library: English that every machine has.

    Modules in an order that mixes topics but is the same everywhere; one document per module.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    names = sorted(sys.stdlib_module_names - {"this", "antigravity"})
    for name in sorted(names, key=lambda n: n[::-1]):
        files = [folder / f"{name}.py", *sorted((folder / name).glob("*.py"))]
        parts: list[str] = []
        for file in files:
            try:
                tree = ast.parse(file.read_bytes())
            except (OSError, SyntaxError, ValueError):
                continue
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
            nodes = (node for node in ast.walk(tree) if isinstance(node, kinds))
            parts += [text for node in nodes if (text := ast.get_docstring(node))]
        prose = "\n\n".join(" ".join(part.split()) for part in parts)
        if len(prose) > 2000:
            yield prose


def _format(tokenizer: Any) -> ChatFormat:
    """The chat format, or plain questions and answers for a model without one."""
    try:
        return ChatFormat.of(tokenizer)
    except ValueError:
        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        reply, stop, turn = encode(tokenizer, ["\nAnswer:", "\n", "\nQuestion:"])
        return ChatFormat(tuple(start), tuple(reply), tuple(stop), tuple(turn))


def _text(rng: np.random.Generator, filler: Filler, length: int, tokenizer: Any) -> Sequence:
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = [np.asarray(start, dtype=np.int64)]
    while sum(map(len, ids)) < length:
        chosen = filler.take(rng, length)
        ids += [filler.sentence_ids(i) for i in chosen]
    joined = np.concatenate(ids).astype(np.int64)[:length]
    nowhere = np.zeros(length, dtype=bool)
    return Sequence(joined, nowhere, nowhere)


def _recall(
    rng: np.random.Generator,
    filler: Filler,
    chat: ChatFormat,
    length: int,
    tokenizer: Any,
    *,
    early: bool = False,
) -> Sequence:
    """A document, sometimes a passage of it again, and questions about its facts.

    With `early` half of the facts stand near its start.
    """
    most = max(1, min(_MOST_NEEDLES, length // _TOKENS_PER_NEEDLE))
    count = int(rng.integers((most + 1) // 2, most + 1))
    passage = _PASSAGE if length >= 8 * _PASSAGE and rng.random() < _SHARE_WITH_PASSAGE else 0
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
    )
    ids: list[int] = [*chat.start, *document.ids.tolist()]
    known = [False] * len(ids)
    if passage:
        begin = len(chat.start) + int(rng.integers(0, len(document.ids) // 2))
        ids += ids[begin : begin + passage]
        known += [position >= _PASSAGE_LEAD for position in range(passage)]
    asked_from = len(ids)
    questions = [document.facts[i] for i in rng.permutation(count)]
    for number in range(10 * length):
        if len(ids) > length:
            break
        piece, marks = _turn(tokenizer, chat, questions[number % count], first=number == 0)
        ids += piece
        known += marks
    # A row is marked when the token it predicts, the next one, is known from far back.
    answer = np.asarray([*known[1 : length + 1], False][:length], dtype=bool)
    asking = (np.arange(length) >= asked_from) & ~answer
    return Sequence(np.asarray(ids[:length], dtype=np.int64), answer, asking)


def _turn(
    tokenizer: Any, chat: ChatFormat, fact: Fact, *, first: bool
) -> tuple[list[int], list[bool]]:
    """A question and its answer as ids, and which of them tell the fact."""
    before, after = fact.answer.split(f" {fact.value}")
    texts = [("\n\n" if first else "") + fact.question, before, f" {fact.value}", after]
    question, before_ids, value, after_ids = encode(tokenizer, texts)
    opening = [] if first else list(chat.turn)
    ids = [*opening, *question, *chat.reply, *before_ids, *value, *after_ids, *chat.stop]
    told = len(opening) + len(question) + len(chat.reply) + len(before_ids)
    marks = [told <= i < told + len(value) for i in range(len(ids))]
    return ids, marks
