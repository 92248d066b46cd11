"""The `ruler` tasks: samples made here at any length, kept on disk, scored as in lm-eval."""

import contextlib
import json
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from sparsek_cli.data import vocabulary
from sparsek_cli.data.corpus import cache_folder
from sparsek_cli.data.filler import split_sentences
from sparsek_cli.data.generated_text import generated_text
from sparsek_cli.data.pieces import told
from sparsek_cli.disk import write_atomically
from sparsek_cli.evaluation.json_values import digest
from sparsek_cli.evaluation.tasks import ruler_samples
from sparsek_cli.evaluation.tasks.local_text import (
    WrongLength,
    documents,
    lengths_of,
    named_text,
    text_as_it_is,
    tokenizer_of,
)
from sparsek_cli.evaluation.tasks.ruler_samples import Haystack

MAKERS: dict[str, Callable[..., dict[str, Any]]] = {
    "niah": ruler_samples.niah,
    "variable_tracking": ruler_samples.variable_tracking,
    "common_words": ruler_samples.common_words,
    "frequent_words": ruler_samples.frequent_words,
}
MAKERS_AT_ONCE = 8  # threads: most of the time is the tokenizer's, which lets others work
FORMAT = 2  # of the samples; a change makes cached ones stale
HAYSTACK_CHARACTERS = 1_500_000
HAYSTACK_DOCUMENTS = 8
GENERATED_SENTENCES = 6000


def dataset(**settings: Any) -> dict:
    """{"test": Dataset of input, asked, gen_prefix, outputs, and depth for needles}.

    Args:
        settings: the task's metadata: tokenizer, max_seq_lengths, text, data, limit, seed and the
            `sparsek` block with maker, options, answer (tokens kept for it) and questions.
    """
    from datasets import Dataset

    block = settings["sparsek"]
    count = settings.get("limit") or block["questions"]
    rows = [row for length in lengths_of(settings) for row in _samples(settings, length, count)]
    return {"test": Dataset.from_list(rows)}


def _samples(settings: dict[str, Any], length: int, count: int) -> list[dict[str, Any]]:
    """The first `count` samples, from the cache when it has as many."""
    block = settings["sparsek"]
    seed = settings.get("seed") or 0
    tokenizer = tokenizer_of(settings)
    key = {
        "format": FORMAT,
        "maker": block["maker"],
        "options": block.get("options"),
        "answer": block["answer"],
        "length": length,
        "seed": seed,
        "source": text_as_it_is(settings),
        "tokenizer": told(tokenizer),
    }
    file = cache_folder().parent / "ruler" / f"{digest(key)}.jsonl"
    made = _cached(file)
    if len(made) >= count:
        return made[:count]
    hay = _haystack(settings)
    make = MAKERS[block["maker"]]

    def one(number: int) -> dict[str, Any]:
        rng = np.random.default_rng([seed, length, number])
        return make(rng, hay, length - block["answer"], **block.get("options", {}))

    try:
        with ThreadPoolExecutor(MAKERS_AT_ONCE) as pool:
            made += pool.map(one, range(len(made), count))
    except ValueError as error:
        raise WrongLength(
            f"{length:,} tokens are too short for a sample and its answer",
            hint="name larger --lengths",
        ) from error
    with contextlib.suppress(OSError):  # a home that cannot be written costs time, not results
        write_atomically(file, "".join(json.dumps(row) + "\n" for row in made))
    return made


def _cached(file: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return []


_HAYSTACKS: dict[tuple, Haystack] = {}


def _haystack(settings: dict[str, Any]) -> Haystack:
    tokenizer = tokenizer_of(settings)
    key = (id(tokenizer), settings.get("seed") or 0, *text_as_it_is(settings))
    if key not in _HAYSTACKS:
        _HAYSTACKS[key] = build_haystack(settings, tokenizer)
    return _HAYSTACKS[key]


def build_haystack(settings: dict[str, Any], tokenizer: Any) -> Haystack:
    """Sentences and words of the text that `settings` names, else generated ones.

    Args:
        settings: text or data, as in `dataset`, and the seed of generated sentences.
        tokenizer: that lengths are counted in.
    """
    if named_text(settings):
        texts = list(islice(documents(settings), HAYSTACK_DOCUMENTS))
        share = HAYSTACK_CHARACTERS // len(texts)
        text = " ".join(text[:share] for text in texts)
    else:
        text = generated_text(np.random.default_rng(settings.get("seed") or 0), GENERATED_SENTENCES)
    sentences = [" ".join(s.split()) for s in split_sentences(text)]
    sentences = [s for s in sentences if s]
    rows = tokenizer([" " + s for s in sentences], add_special_tokens=False, verbose=False)
    lengths = np.cumsum([len(ids) for ids in rows["input_ids"]]).tolist()

    def count(piece: str) -> int:
        return len(tokenizer(piece, verbose=False)["input_ids"])

    own = set(vocabulary.NOUNS) | set(vocabulary.MATERIALS)
    words = own | set(re.findall(r"\b[a-z]{3,10}\b", text))
    keys = [f"{a}-{b}" for a in vocabulary.MATERIALS for b in vocabulary.NOUNS]
    return Haystack(sentences, lengths, _enough(sorted(words)), keys, count)


def _enough(words: list[str], wanted: int = 12_000) -> list[str]:
    """`words`, and pronounceable ones that are no words until there are `wanted`."""
    rng = np.random.default_rng(0)
    parts = [c + v for c in "bdfghklmnprstvz" for v in "aeiou"]
    found = dict.fromkeys(words)
    while len(found) < wanted:
        found["".join(parts[int(i)] for i in rng.integers(len(parts), size=3))] = None
    return list(found)


def process_results(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """score: share of the expected strings that are in the answer (RULER's string match, all)."""
    answer = re.sub(r"[\x00-\x1f]", "\n", results[0].strip()).strip().lower()
    return {"score": sum(text.lower() in answer for text in doc["outputs"]) / len(doc["outputs"])}
