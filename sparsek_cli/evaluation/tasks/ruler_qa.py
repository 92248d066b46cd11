"""RULER's two question-answering tasks: real questions, their documents among unrelated ones.

Questions come from DIR/<squad or hotpot>/validation.jsonl[.zst] under --data, with the columns
question, answers and documents, or from the hub's SQuAD and HotpotQA.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparsek_cli.data.text.columns import whole
from sparsek_cli.data.text.read_files import json_rows
from sparsek_cli.errors import SparsekError
from sparsek_cli.evaluation.tasks.local_text import WrongLength, lengths_of, tokenizer_of
from sparsek_cli.evaluation.tasks.ruler_samples import asked_after

PROMPT = (
    "Answer the question based on the given documents. Only give me the answer and do not output "
    "any other words.\n\nThe following are given documents.\n\n{context}\n\nAnswer the question "
    "based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "Question: {query}"
)
PREFIX = "Answer:"
HUB = {"squad": ("rajpurkar/squad", None), "hotpot": ("hotpotqa/hotpot_qa", "distractor")}


def dataset(**settings: Any) -> dict:
    """{"test": Dataset of input, asked, gen_prefix, outputs}; settings as in ruler.py."""
    from datasets import Dataset

    block = settings["sparsek"]
    source = _questions(settings, block["source_set"])
    pool = list(dict.fromkeys(text for row in source for text in row["documents"]))
    tokenizer = tokenizer_of(settings)
    rows = []
    for length in lengths_of(settings):
        for number, row in enumerate(source[: settings.get("limit") or block["questions"]]):
            rng = np.random.default_rng([settings.get("seed") or 0, length, number])
            rows.append(_sample(rng, row, pool, tokenizer, length - block["answer"]))
    return {"test": Dataset.from_list(rows)}


def _sample(
    rng: np.random.Generator, row: dict[str, Any], pool: list[str], tokenizer: Any, room: int
) -> dict[str, Any]:
    def count(text: str) -> int:
        return len(tokenizer(text, verbose=False)["input_ids"])

    chosen = list(row["documents"])
    fixed = PROMPT.format(context="", query=row["question"]) + " " + PREFIX
    used = count(fixed) + sum(count(f"Document 99:\n{text}\n\n") for text in chosen)
    for index in rng.permutation(len(pool)):
        if pool[index] in row["documents"]:
            continue
        used += count(f"Document 99:\n{pool[index]}\n\n")
        if used > room:
            break
        chosen.append(pool[index])
    order = rng.permutation(len(chosen))
    context = "\n\n".join(f"Document {i}:\n{chosen[k]}" for i, k in enumerate(order, 1))
    text = PROMPT.format(context=context, query=row["question"])
    if count(f"{text} {PREFIX}") > room:
        raise WrongLength(
            f"the documents of one question do not fit into {room:,} tokens",
            hint="name larger --lengths",
        )
    asked = asked_after(PROMPT, query=row["question"])
    return {"input": text, "asked": asked, "gen_prefix": PREFIX, "outputs": list(row["answers"])}


def _questions(settings: dict[str, Any], name: str) -> list[dict[str, Any]]:
    if settings.get("data") is not None:
        return list(_local(Path(settings["data"]), name))
    return list(_from_hub(name))


def _local(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    from sparsek_cli.evaluation.tasks.scrolls import local_files

    files = local_files(folder, name)
    if "validation" not in files:
        raise SparsekError(
            f"no {name}/validation.jsonl[.zst] under {folder}",
            hint="one object per line: question, answers (list), documents (list)",
        )
    for place, row in json_rows(files["validation"]):
        found = {key: row.get(key) for key in ("question", "answers", "documents")}
        for key, value in found.items():
            texts = [value] if key == "question" else value
            if not (isinstance(texts, list) and texts and all(isinstance(t, str) for t in texts)):
                kind = "text" if key == "question" else "list of texts"
                raise SparsekError(
                    f"{place}: not a question ('{key}' is no {kind})",
                    hint="one object per line: question, answers (list), documents (list)",
                )
            for text in texts:
                whole(text, place)
        yield found


def _from_hub(name: str) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset

    path, config = HUB[name]
    for row in load_dataset(path, config, split="validation"):
        if name == "squad":
            documents, answers = [row["context"]], row["answers"]["text"]
        else:
            context = row["context"]
            pages = zip(context["title"], context["sentences"], strict=True)
            documents = [f"{title}\n{''.join(sentences)}" for title, sentences in pages]
            answers = [row["answer"]]
        yield {"question": row["question"], "answers": answers, "documents": documents}


def process_results(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """score: whether any of the accepted answers is in the reply (RULER's string match, part)."""
    reply = results[0].lower()
    return {"score": float(any(answer.lower() in reply for answer in doc["outputs"]))}
