"""The `recall` tasks: facts hidden in long filler text, asked for when all of it has been read.

Each sample is one question; the questions about one document follow each other and share all of it,
so that the harness reads it once. The order of facts within a document, their depths and phrasings
are random, but the same for every policy and independent of `--limit`.
"""

from collections.abc import Sequence
from itertools import islice
from os.path import commonprefix
from typing import Any

import numpy as np

from sparsek_cli.data.chat_format import rendered
from sparsek_cli.data.generated_text import generated_text
from sparsek_cli.data.needles import (
    Filler,
    NeedleDocument,
    chat_messages,
    is_correct,
    make_document,
    plain_prompt,
)
from sparsek_cli.data.phrasings import phrasings
from sparsek_cli.evaluation.tasks.local_text import (
    WrongLength,
    documents,
    lengths_of,
    named_text,
    text_as_it_is,
    tokenizer_of,
)

ROOM = 112  # tokens kept free for the question, the chat template and the answer
TURNS_ROOM = 320  # the same where earlier questions and answers stand in the prompt too
FILLER_DOCUMENTS = 8
FILLER_CHARACTERS = 400_000  # of each; sentences are drawn from them
GENERATED_SENTENCES = 4000


def dataset(**settings: Any) -> dict:
    """{"test": Dataset of prompt, question, answer, value, depth, phrasing, split, document id}.

    `asked` is all of the prompt that follows the document, in whose context facts are hidden.
    Where questions come in turns, `first_turn` is how many characters of the prompt come before the
    first answer.

    Args:
        settings: the task's metadata: tokenizer, max_seq_lengths, text, data, limit, seed, chat
            (whether prompts are in the chat template) and the `sparsek` block with needles,
            questions, and optionally depths (lowest, highest), distractors, phrasings (splits)
            and turns (each question follows the earlier ones about its document, answered).
    """
    from datasets import Dataset

    block = settings["sparsek"]
    count = settings.get("limit") or block["questions"]
    filler = _filler(settings)
    rows = []
    for length in lengths_of(settings):
        made: list[dict[str, Any]] = []
        number = 0
        while len(made) < count:
            made += _questions(settings, filler, length, number)
            number += 1
        rows += made[:count]
    return {"test": Dataset.from_list(rows)}


def _questions(
    settings: dict[str, Any], filler: Filler, length: int, number: int
) -> list[dict[str, Any]]:
    """The questions about document `number`, in random order."""
    block = settings["sparsek"]
    needles = block["needles"]
    rng = np.random.default_rng([settings.get("seed") or 0, length, needles, number])
    splits = block.get("phrasings", ())
    room = TURNS_ROOM if block.get("turns") else ROOM
    try:
        document = make_document(
            rng,
            filler,
            tokens=length - room,
            needles=needles,
            phrasings=phrasings(*splits),
            depths=_depths(rng, block.get("depths"), needles, number),
            distractors=block.get("distractors", 0),
        )
    except ValueError as error:
        raise WrongLength(
            f"{length:,} tokens are too short for the hidden facts ({needles}) and a question",
            hint="name larger --lengths",
        ) from error
    if len(document.ids) > length - room:
        raise WrongLength(
            f"{length:,} tokens are too short for the hidden facts and one sentence of the text",
            hint="name larger --lengths",
        )
    order = [int(i) for i in rng.permutation(len(document.facts))]
    name = f"{length}-{needles}-{number}"
    return [
        _row(settings, document, fact, name, order[:turn] if block.get("turns") else [])
        for turn, fact in enumerate(order)
    ]


def _depths(
    rng: np.random.Generator, given: Sequence[float] | None, needles: int, number: int
) -> list[float]:
    """One depth per needle, spread evenly; over documents when there are few needles."""
    if given:
        low, high = given
        return sorted(low + (high - low) * rng.random(needles))
    if needles >= 4:
        return list((np.arange(needles) + rng.random(needles)) / needles)
    # The golden ratio's multiples cover [0, 1] evenly however many documents there are.
    return [(0.5 + (number * needles + i) * 0.6180339887) % 1 for i in range(needles)]


def _row(
    settings: dict[str, Any],
    document: NeedleDocument,
    which: int,
    name: str,
    before: Sequence[int],
) -> dict[str, Any]:
    fact = document.facts[which]
    if settings["sparsek"].get("turns"):
        prompt = _conversation(settings, document, [*before, which])
    elif settings.get("chat"):
        prompt = chat_messages(document.text, fact.question)[0]["content"]
    else:
        prompt = plain_prompt(document.text, fact.question)
    turns = {}
    if settings["sparsek"].get("turns"):
        first = _conversation(settings, document, [*before, which][:1])
        turns = {"first_turn": len(commonprefix([first, prompt]))}
    return turns | {
        "prompt": prompt,
        "asked": prompt.split(document.text.strip(), 1)[1].strip(),
        "question": fact.question,
        "answer": fact.answer,
        "value": fact.value,
        "depth": round(fact.depth, 4),
        "phrasing": fact.phrasing.name,
        "split": fact.phrasing.split,
        "turn": len(before),
        "document": name,
    }


def _conversation(settings: dict[str, Any], document: NeedleDocument, facts: Sequence[int]) -> str:
    """The turns so far with their right answers, ending in the question about the last fact."""
    *answered, asked = (document.facts[i] for i in facts)
    tokenizer = tokenizer_of(settings)
    if not settings.get("chat", tokenizer.chat_template):  # lm-eval by itself does not say
        told = [plain_prompt(document.text, f.question) + f" {f.value}." for f in answered]
        rounds = [text[len(document.text) :] for text in told]
        return document.text + "".join(rounds) + plain_prompt("", asked.question)
    messages: list[dict[str, str]] = []
    for fact in answered:
        messages += [
            {"role": "user", "content": fact.question},
            {"role": "assistant", "content": fact.answer},
        ]
    messages.append({"role": "user", "content": asked.question})
    messages[0] = chat_messages(document.text, messages[0]["content"])[0]
    return rendered(tokenizer, messages, add_generation_prompt=True)


_FILLERS: dict[tuple, Filler] = {}


def _filler(settings: dict[str, Any]) -> Filler:
    """Sentences to hide facts in; cutting and tokenising them is shared by all recall tasks."""
    tokenizer = tokenizer_of(settings)
    seed = settings.get("seed") or 0
    key = (id(tokenizer), seed, *text_as_it_is(settings))
    if key not in _FILLERS:
        if named_text(settings):
            texts = [t[:FILLER_CHARACTERS] for t in islice(documents(settings), FILLER_DOCUMENTS)]
        else:
            rng = np.random.default_rng(seed)
            texts = [generated_text(rng, GENERATED_SENTENCES)]
        _FILLERS[key] = Filler.from_documents(texts, tokenizer)
    return _FILLERS[key]


def process_results(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float | None]:
    """exact: the first line is the answer and nothing else; contains: the value is in it.

    `exact_heldout` is `exact` for phrasings that calibration never sees, and None for the others:
    every sample has every metric, or lm-eval loses it where processes share the samples.
    """
    reply = results[0].strip().split("\n")[0]
    said = _plain(reply)
    exact = float(said in (_plain(doc["answer"]), _plain(doc["value"])))
    return {
        "exact": exact,
        "contains": float(is_correct(reply, doc["value"])),
        "exact_heldout": None if doc["split"] == "calibration" else exact,
    }


def mean_of_given(items: Sequence[float | None]) -> float:
    """Mean over the samples that have the metric; NaN when none has."""
    given = [item for item in items if item is not None]
    return sum(given) / len(given) if given else float("nan")


def _standard_error(items: Sequence[float | None]) -> float | None:
    given = [item for item in items if item is not None]
    return float(np.std(given, ddof=1) / len(given) ** 0.5) if len(given) > 1 else None


mean_of_given.standard_error = _standard_error


def _plain(text: str) -> str:
    return " ".join(text.lower().strip().rstrip(".!").split())
