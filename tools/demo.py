"""The whole idea on one machine: convert, fine-tune, evaluate, chat (`make demo`).

At the end it asks for eight facts in a long document, and counts what SparseK, dense attention and
a window find: it exits 0 where SparseK finds as many as dense, or at most two fewer. One question
would be a toss of a coin.

Runs the command line exactly as a user would, prints each command before it, and needs neither a
GPU nor a network. Text comes from Python's own documentation, which every Python carries.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sparsek_cli.console import report_error
from sparsek_cli.errors import UsageError
from sparsek_cli.output.place import check_file

if TYPE_CHECKING:
    from sparsek_cli.data.needles import NeedleDocument

SEED = 7  # of the document, unless --seed says otherwise
ALLOWANCE = 2  # facts that SparseK may find less than dense attention
BUDGET = "1/16"  # of tiny's context: 512 slots instead of 8192
LENGTH = 8192  # tokens of the document, and of what is measured
TEXTS = ("train.jsonl", "validation.jsonl", "document.txt")


def main(arguments: Sequence[str] = ()) -> int:
    """Runs the demo in runs/demo below the current folder; returns the exit code."""
    parser = argparse.ArgumentParser(description="Convert, fine-tune, evaluate and chat.")
    parser.add_argument("--seed", type=int, default=SEED, help="of the long document")
    seed = parser.parse_args(arguments).seed
    folder = Path("runs/demo")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for name in TEXTS:
            check_file(folder / name, overwrite=True, suffixes=(Path(name).suffix,))
    except UsageError as error:
        report_error(error.message, error.hint)
        return error.exit_code
    start = time.monotonic()
    texts, document = _write_texts(folder, seed)
    converted, tuned, results = folder / "tiny-sparsek", folder / "tiny-tuned", folder / "results"

    _run("1/5  convert: learn which keys to keep, the model itself unchanged",
         "convert", "tiny", converted, "--budget", BUDGET, "--overwrite")  # fmt: skip
    _run("2/5  fine-tune: a few steps on text found on this machine",
         "finetune", converted, tuned, "--recipe", "demo", f"data.text.files={texts['train']}",
         "--overwrite")  # fmt: skip
    _run("3/5  evaluate: sparse, dense, window and random at equal bytes",
         "evaluate", tuned, "--recipe", "demo", "--text", texts["validation"],
         "--lengths", LENGTH, "--output", results, "--overwrite")  # fmt: skip
    _run("4/5  chat: read a long document, ask about the first of its facts",
         "chat", tuned, "--load", texts["document"], "--prompt", document.facts[0].question,
         "--temperature", "0")  # fmt: skip
    print(f"\n5/5  ask about all {len(document.facts)} facts, under three policies", flush=True)
    counts = _ask(tuned, document)
    fine = counts["sparsek"] >= counts["dense"] - ALLOWANCE
    print(f"\nplots:    {', '.join(str(p) for p in sorted(results.rglob('*.png')))}")
    print(f"took:     {time.monotonic() - start:.0f} s\n\nNext, with a real model:")
    for line in (
        "sparsek convert qwen3-0.6b",
        "sparsek finetune qwen3-0.6b-sparsek --recipe scorers --data my-documents/",
        "sparsek evaluate --tasks scrolls --baselines dense,window,random",
        "sparsek chat --load my-document.txt",
    ):
        print(f"  {line}")
    return 0 if fine else 1


def _ask(model: Path, document: "NeedleDocument") -> dict[str, int]:
    """Prints which facts are found, and returns how many under each policy."""
    import sparsek_cli as sparsek
    from demo_facts import POLICIES, answers, found

    weights, tokenizer = sparsek.load(str(model))
    hits = {p: found(document, answers(weights, tokenizer, document, p)) for p in POLICIES}
    print(f"{'depth':>6}  {'expected':<12}" + "".join(f"{name:<9}" for name in POLICIES))
    for number, fact in enumerate(document.facts):
        marks = "".join(f"{'found' if hits[name][number] else '-':<9}" for name in POLICIES)
        print(f"{fact.depth:>6.2f}  {fact.expected:<12}{marks}")
    counts = {name: sum(hits[name]) for name in POLICIES}
    shown = ", ".join(f"{name} {count}" for name, count in counts.items())
    print(f"found of {len(document.facts)}: {shown}", flush=True)
    return counts


def _write_texts(folder: Path, seed: int) -> tuple[dict[str, str], "NeedleDocument"]:
    """Paths of text to train on, text to measure on and the long document; and the document."""
    from pydoc_data.topics import topics

    from demo_facts import document_of
    from sparsek_cli.data.needles import Filler

    paths = {Path(name).stem: str(folder / name) for name in TEXTS}
    measured = _measured()
    texts = ([p for p in _paragraphs(topics[name]) if p not in measured] for name in sorted(topics))
    _write_documents(paths["train"], [" ".join(paragraphs) for paragraphs in texts])
    # One long document, so that perplexity can be measured far from its start.
    _write_documents(paths["validation"], [measured_text()])
    filler = Filler.from_documents([measured_text()], _tokenizer())
    document = document_of(filler, LENGTH - 128, seed)
    Path(paths["document"]).write_text(document.text, encoding="utf-8")
    return paths, document


def measured_text() -> str:
    """The third of Python's documentation that nothing is trained on."""
    return " ".join(_measured())


def _measured() -> dict[str, None]:
    # Topics quote each other: a paragraph counts once, and what is measured is not trained on.
    from pydoc_data.topics import topics

    held_out = sorted(topics)[::3]
    return dict.fromkeys(p for name in held_out for p in _paragraphs(topics[name]))


def _paragraphs(topic: str) -> list[str]:
    """Those of a help topic that are sentences: no grammar, code or tables."""
    paragraphs = (" ".join(p.split()) for p in topic.split("\n\n") if not p.startswith(" "))
    return [p for p in paragraphs if p.endswith((".", ":")) and "::=" not in p]


def _write_documents(path: str, texts: list[str]) -> None:
    rows = (json.dumps({"text": text}) + "\n" for text in texts if text)
    Path(path).write_text("".join(rows), encoding="utf-8")


def _tokenizer():
    from transformers import AutoTokenizer

    from sparsek_cli import hub

    return AutoTokenizer.from_pretrained(hub.bundled().path)


def _run(title: str, *words: object) -> None:
    """Runs `sparsek ...` offline; stops the demo when it fails."""
    arguments = [str(word) for word in words]
    print(f"\n{title}\n$ sparsek {shlex.join(arguments)}", flush=True)
    start = time.monotonic()
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "SPARSEK_STATE_DIR": str(Path("runs/demo/state").resolve()),
    }
    done = subprocess.run(
        [sys.executable, "-m", "sparsek_cli", *arguments],
        env=environment,
    )  # fmt: skip
    if done.returncode:
        sys.exit(done.returncode)
    print(f"({time.monotonic() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
