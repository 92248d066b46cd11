"""kill -9 at random moments of convert, finetune and evaluate: what is left, and what comes of it.

    python tools/kill_runs.py --count 60

Each round starts a run, kills it after a random share of the time that a whole run takes, looks at
what it left, and lets the same command finish (`--resume` where the verb has it). Of every round:

- OUT is absent, or it is the old one or the new one as a whole; results in it, and in OUT.part,
  where those that replace it are measured, are whole files;
- the next run ends with what an uninterrupted run gives: the same weights, the same results;
- nothing is left beside OUT then.

Half of the rounds replace an OUT that is already there. Runs are forked from one process that has
imported everything, so that a round takes a second or two; the killed process is the run itself.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from whole_outputs import digest_of_model, digest_of_results, part_of, whole_model, whole_results

TEXT = "Line {}: the harbour master counted {} crates and wrote them down.\n"
# What runs would import each for itself.
EARLY = (
    "accelerate", "lm_eval.models.huggingface", "matplotlib.pyplot", "transformers.trainer",
    "sparsek_cli.models", "sparsek_cli.conversion.run", "sparsek_cli.evaluation.run",
    "sparsek_cli.training.run",
)  # fmt: skip


def make_base(folder: Path) -> None:
    """A tiny random Llama with the bundled tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from sparsek_cli import hub

    tokenizer = AutoTokenizer.from_pretrained(hub.bundled().path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@dataclass
class Verb:
    """One verb's run: its words, and what its OUT comes to."""

    name: str
    words: list[str]
    digest: Callable[[Path], str]
    whole: Callable[[Path, set[str]], bool]
    resumes: bool = False
    counts: dict[str, int] = field(default_factory=dict)


def wrong_with(verb: Verb, out: Path, known: set[str], *, was_there: bool) -> str | None:
    """What is wrong with what a killed run left, or None.

    Args:
        known: digests of what uninterrupted runs give.
        was_there: a whole OUT was to be replaced.
    """
    if not verb.whole(out, known):
        return "half-written"
    if was_there and out.exists() and verb.digest(out) not in known:
        return "neither the old one nor the new one"
    return None


@contextmanager
def running(words: list[str], log: Path) -> Iterator[int]:
    """The pid of a forked process that runs the command."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with log.open("wb") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            from sparsek_cli.app import run

            code = run(words)
        finally:
            os._exit(code)
    try:
        yield pid
    finally:
        while not _ended(pid):
            time.sleep(0.01)


_codes: dict[int, int] = {}


def _ended(pid: int) -> bool:
    if pid not in _codes:
        done, status = os.waitpid(pid, os.WNOHANG)
        if not done:
            return False
        _codes[pid] = os.waitstatus_to_exitcode(status)
    return True


def finish(words: list[str], log: Path) -> float:
    """Runs the command to its end; seconds."""
    start = time.monotonic()
    with running(words, log) as pid:
        pass
    if _codes[pid] != 0:
        raise SystemExit(f"{' '.join(words)} ended with {_codes[pid]}:\n{log.read_text()}")
    return time.monotonic() - start


def kill_after(words: list[str], seconds: float, log: Path) -> bool:
    """Whether the command was still running when it was killed."""
    start = time.monotonic()
    with running(words, log) as pid:
        while time.monotonic() - start < seconds and not _ended(pid):
            time.sleep(0.002)
        if not _ended(pid):
            os.kill(pid, signal.SIGKILL)
    return _codes[pid] == -signal.SIGKILL


def verbs(root: Path) -> dict[str, Verb]:
    """The three verbs, small enough to end within seconds."""
    text, base, sparse = root / "text.txt", root / "base", root / "sparse"
    convert = [str(base), "--calibrate", "none", "--topk", "12", "--window", "8", "-q"]
    finetune = [
        str(sparse), "--data", str(text), "--steps", "6", "train=all", "sequence_length=64",
        "batch_size=2", "save_steps=1", "evaluation.sequences=2",
        "data_workers=0", "--device", "cpu",
    ]  # fmt: skip
    evaluate = [
        str(sparse), "--tasks", "ppl,recall_1", "--lengths", "96", "--limit", "2", "--text",
        str(text), "--baselines", "dense,window", "--device", "cpu",
    ]  # fmt: skip
    return {
        "convert": Verb("convert", convert, digest_of_model, whole_model),
        "finetune": Verb("finetune", finetune, digest_of_model, whole_model, resumes=True),
        "evaluate": Verb("evaluate", evaluate, digest_of_results, whole_results, resumes=True),
    }


def words_for(verb: Verb, out: Path, *more: str) -> list[str]:
    """The command line with OUT where the verb wants it."""
    model, *rest = verb.words
    place = ["-o", str(out)] if verb.name == "evaluate" else [str(out)]
    return [verb.name, model, *place, *rest, *more]


def resumable(verb: Verb, out: Path) -> bool:
    """Whether a killed run left something that --resume goes on from."""
    if verb.name == "evaluate":
        return (out / "run.json").is_file()
    return verb.resumes and any(part_of(out).glob("checkpoint-*"))


def rounds(verb: Verb, root: Path, count: int, rng: random.Random) -> dict[str, int]:
    """Until `count` runs were killed; what was seen, or SystemExit at the first wrong thing."""
    place, log = root / verb.name, root / "log.txt"
    place.mkdir()
    out = place / "out"
    finish(words_for(verb, out), log)
    expected = verb.digest(out)
    took = finish(words_for(verb, out, "--overwrite"), log)
    known = {expected}
    counts = {"killed": 0, "ended before": 0, "resumed": 0, "seconds": 0}
    start, number = time.monotonic(), 0
    while counts["killed"] < count:
        number += 1
        replaces = number % 2 == 1
        if not replaces:
            shutil.rmtree(place)
            place.mkdir()
        more = ["--overwrite"] if replaces else []
        was_there = out.exists()
        began = time.monotonic()
        killed = kill_after(words_for(verb, out, *more), rng.uniform(0, took), log)
        counts["killed" if killed else "ended before"] += 1
        if not killed:  # the machine is less busy than when a whole run was timed
            took = min(took, time.monotonic() - began)
        wrong = wrong_with(verb, out, known, was_there=was_there)
        if wrong:
            raise SystemExit(f"{verb.name}, round {number}: {out} is {wrong}")
        if verb.name == "evaluate" and part_of(out).exists():
            counts["in OUT.part"] = counts.get("in OUT.part", 0) + 1
        if verb.name != "evaluate" and was_there and not out.exists():
            counts["set aside"] = counts.get("set aside", 0) + 1
        resumes = resumable(verb, out)
        counts["resumed"] += resumes
        again = ["--resume"] if resumes else ["--overwrite"]
        if resumes and verb.name == "finetune" and out.exists():
            again.append("--overwrite")
        finish(words_for(verb, out, *again), log)
        if verb.digest(out) != expected:
            raise SystemExit(f"{verb.name}, round {number}: another result after the kill")
        left = sorted(path.name for path in place.iterdir())
        if left != ["out"] or list(out.rglob("*.part")):
            raise SystemExit(f"{verb.name}, round {number}: left behind: {left}")
        if sys.stderr.isatty() or number % 10 == 0:
            print(f"{verb.name}, round {number}: {counts}", file=sys.stderr, flush=True)
    counts["seconds"] = round(time.monotonic() - start)
    return counts


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=60, help="kills of each verb [60]")
    parser.add_argument("--verbs", default="convert,finetune,evaluate")
    parser.add_argument("--seed", type=int, default=0)
    wanted = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Forked runs have no threads of this process.
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        os.environ.update(SPARSEK_STATE_DIR=str(root / "s"), SPARSEK_CACHE_DIR=str(root / "c"))
        (root / "text.txt").write_text("".join(TEXT.format(i, 7 * i) for i in range(300)))
        make_base(root / "base")
        for module in EARLY:
            importlib.import_module(module)
        every = verbs(root)
        finish(words_for(every["convert"], root / "sparse"), root / "log.txt")
        for name in wanted.verbs.split(","):
            seen = rounds(every[name], root, wanted.count, random.Random(wanted.seed))
            shown = ", ".join(f"{key} {value}" for key, value in seen.items())
            print(f"{name}: all whole and equal ({shown})", flush=True)


if __name__ == "__main__":
    sys.exit(main())
