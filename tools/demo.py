"""The whole idea on one machine: convert, fine-tune, evaluate, chat (`make demo`).

Runs the command line exactly as a user would, prints each command before it, and needs neither a
GPU nor a network. Text comes from Python's own documentation, which every Python carries.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from sparsek_cli.console import report_error
from sparsek_cli.errors import UsageError
from sparsek_cli.output.place import check_file

SEED = 7
BUDGET = "1/16"  # of tiny's context: 512 slots instead of 8192
LENGTHS = (4096, 8192)
TEXTS = ("train.jsonl", "validation.jsonl", "document.txt")


def main() -> int:
    """Runs the demo in runs/demo below the current folder; returns the exit code."""
    folder = Path("runs/demo")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for name in TEXTS:
            check_file(folder / name, overwrite=True, suffixes=(Path(name).suffix,))
    except UsageError as error:
        report_error(error.message, error.hint)
        return error.exit_code
    start = time.monotonic()
    texts = _write_texts(folder)
    converted, tuned, results = folder / "tiny-sparsek", folder / "tiny-tuned", folder / "results"

    _run("1/4  convert: learn which keys to keep, the model itself unchanged",
         "convert", "tiny", converted, "--budget", BUDGET, "--overwrite")  # fmt: skip
    _run("2/4  fine-tune: a few steps on text found on this machine",
         "finetune", converted, tuned, "--recipe", "demo", f"data.text.files={texts['train']}",
         "--overwrite")  # fmt: skip
    _run("3/4  evaluate: sparse, dense, window and random at equal bytes",
         "evaluate", tuned, "--recipe", "demo", "--text", texts["validation"], "--lengths",
         ",".join(map(str, LENGTHS)), "--output", results, "--overwrite")  # fmt: skip
    answer = _run("4/4  chat: read a long document, ask about a fact near its start",
                  "chat", tuned, "--load", texts["document"], "--prompt", texts["question"],
                  "--temperature", "0", capture=True)  # fmt: skip

    from sparsek_cli.data.needles import is_correct

    answered = is_correct(answer, texts["expected"])
    print(f"\nasked:    {texts['question']}\nanswered: {answer.strip()}")
    print(f"expected: {texts['expected']}  ->  {'found' if answered else 'NOT FOUND'}")
    print(f"\nplots:    {', '.join(str(p) for p in sorted(results.rglob('*.png')))}")
    print(f"took:     {time.monotonic() - start:.0f} s\n\nNext, with a real model:")
    for line in (
        "sparsek convert qwen3-0.6b",
        "sparsek finetune qwen3-0.6b-sparsek --recipe scorers --data my-documents/",
        "sparsek eval --tasks scrolls --baselines dense,window,random",
        "sparsek chat --load my-document.txt",
    ):
        print(f"  {line}")
    return 0 if answered else 1


def _write_texts(folder: Path) -> dict[str, str]:
    """Text to train on, text to measure on, and a document with one fact near its start."""
    from pydoc_data.topics import topics

    import numpy as np

    from sparsek_cli.data.needles import Filler, make_document
    from sparsek_cli.data.phrasings import phrasings

    names = sorted(topics)
    held_out = names[::3]
    paths = {part: str(folder / f"{part}.jsonl") for part in ("train", "validation")}
    # Topics quote each other: a paragraph counts once, and what is measured is not trained on.
    measured = dict.fromkeys(p for name in held_out for p in _paragraphs(topics[name]))
    texts = ([p for p in _paragraphs(topics[name]) if p not in measured] for name in names)
    _write_documents(paths["train"], [" ".join(paragraphs) for paragraphs in texts])
    # One long document, so that perplexity can be measured far from its start.
    validation = " ".join(measured)
    _write_documents(paths["validation"], [validation])

    tokenizer = _tokenizer()
    filler = Filler.from_documents([validation], tokenizer)
    document = make_document(
        np.random.default_rng(SEED), filler, tokens=LENGTHS[-1] - 128, needles=1,
        phrasings=phrasings("held_out"), depths=[0.1],
    )  # fmt: skip
    [fact] = document.facts
    (folder / "document.txt").write_text(document.text, encoding="utf-8")
    return {
        **paths,
        "document": str(folder / "document.txt"),
        "question": fact.question,
        "expected": fact.expected,
    }


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


def _run(title: str, *words: object, capture: bool = False) -> str:
    """Runs `sparsek ...` offline; stops the demo when it fails. Returns stdout when captured."""
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
        env=environment, text=True, stdout=subprocess.PIPE if capture else None,
    )  # fmt: skip
    if done.returncode:
        sys.exit(done.returncode)
    print(f"({time.monotonic() - start:.0f} s)", flush=True)
    return done.stdout or ""


if __name__ == "__main__":
    sys.exit(main())
