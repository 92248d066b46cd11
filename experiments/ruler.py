"""RULER's needle tasks under all policies: a base is taught their wording, converted, measured.

    python -m experiments.ruler OUT --model BASE \\
        --train books/train-00.jsonl.zst --held-out books/validation.jsonl.zst

A small base has never seen RULER's questions. Its rotary positions are stretched by YaRN to the
longest of `--lengths`; it learns the questions from short samples (260 to 1,600 tokens in text of
`--train`, recipe small-3-ruler), is converted to `--budget` slots, calibrated on documents of half
the longest length, and evaluated by `sparsek evaluate --recipe ruler` in text it has not read.
`--no-teaching` measures BASE as it is.

OUT/results.json holds a row per length and policy (mean score of the tasks), OUT/eval what
evaluate writes, report.html among it. `--smoke`: toy sizes on a CPU.
"""

import argparse
import json
import multiprocessing
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig

from experiments.steps import Steps
from experiments.suite import with_tokenizer
from sparsek_cli.benchmarks.session import Session, arguments
from sparsek_cli.devices import choose_device
from sparsek_cli.evaluation.tasks import ruler_samples
from sparsek_cli.evaluation.tasks.catalogue import catalogue
from sparsek_cli.evaluation.tasks.ruler import build_haystack
from sparsek_cli.loading import load_tokenizer
from sparsek_cli.loading.positions import stretch
from sparsek_cli.recipes.load import load_recipe
from sparsek_cli.recipes.schema_evaluate import EvaluateRecipe

GROUP = "niah"
SAMPLES = 4000
TOKENS = (260, 1600)  # fewest and most of a sample
SEED = 1234
COLUMNS = ("length", "policy", "score", "tasks")
_TEACH = ("steps=2", "warmup=1", "data_workers=0", "batch_size=2", "micro_batch_size=1",
          "sequence_length=512")  # fmt: skip


def main() -> None:
    given = _arguments()
    session = Session.of(given)
    Experiment(session, given).run()


def _arguments() -> argparse.Namespace:
    parser = arguments("experiments.ruler", __doc__, seconds=600)
    parser.add_argument("--model", default="tiny", help="dense base: a folder, or tiny")
    parser.add_argument("--train", required=True, help="text around the samples to learn from")
    parser.add_argument("--held-out", required=True, help="text around those that are measured")
    parser.add_argument("--budget", type=int, default=2048, help="slots per KV head")
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 8192, 16384, 32768])
    parser.add_argument("--limit", type=int, default=5, help="samples of each task and length")
    parser.add_argument("--no-teaching", action="store_true", help="measure the base as it is")
    given = parser.parse_args()
    if given.smoke:
        given.lengths, given.limit, given.budget = [1024], 1, 64
    return given


class Experiment:
    """Samples, teaching, conversion, evaluation: each uses what the last one left."""

    def __init__(self, session: Session, given: argparse.Namespace):
        self.session, self.given = session, given
        self.out = session.folder
        self.device = choose_device(given.device)
        self.steps = Steps(session, [f"device={self.device.type}"])

    def run(self) -> None:
        """All four, then the table."""
        base: Path | None = with_tokenizer(self.given.model, self.out / "base")
        base = stretched(base, self.out / "stretched", max(self.given.lengths))
        if not self.given.no_teaching:
            base = self.session.run("teach", partial(self.teach, base))
        if base is not None:
            done = self.session.run("convert", partial(self.convert, base), needs=20)
            if done is not None:
                self.session.run("evaluate", self.evaluate, needs=20)
        print(self.session.table(COLUMNS), flush=True)
        self.session.say(f"wrote {self.out / 'results.json'}")

    def teach(self, base: Path) -> Path:
        """The base after small-3-ruler."""
        file = self.out / "samples.jsonl"
        count = 40 if self.given.smoke else SAMPLES
        processes = 1 if self.given.smoke else min(8, os.cpu_count() or 1)
        lines = samples(base, self.given.train, count, processes=processes)
        file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
        self.session.say(f"{len(lines)} samples")
        words = [f"data.novels.files={json.dumps(self.given.train)}"]
        words += [f"data.ruler.files={json.dumps(str(file))}"]
        words += [f"minutes={max(10.0, 0.5 * self.session.left) / 60:.3f}"]
        words += _TEACH if self.given.smoke else ()
        self.steps.finetune("small-3-ruler", self.out / "taught", *words, model=base)
        return self.out / "taught"

    def convert(self, base: Path) -> Any:
        """To the budget, calibrated in text of --train."""
        settings: dict[str, Any] = {"budget": self.given.budget, "device": self.device.type}
        settings["calibrate"] = "none" if self.given.smoke else self.given.train
        settings["calibrate_length"] = max(self.given.lengths) // 2
        return self.steps.convert(base, self.out / "sparse", settings)

    def evaluate(self) -> None:
        """`sparsek evaluate --recipe ruler`, and a row per length and policy."""
        from sparsek_cli.evaluation.plan import plan
        from sparsek_cli.evaluation.run import run

        words = [f"lengths={self.given.lengths}", f"limit={self.given.limit}"]
        words += [f"text={json.dumps([self.given.held_out])}"]
        if self.given.smoke:
            words += ["tasks=[ruler_niah_single_1]", "baselines=[dense,window]"]
        shown = f"{self.out / 'sparse'} --recipe ruler {' '.join(words)}"
        self.session.say(f"$ sparsek evaluate {shown}")
        flags = {
            "model": str(self.out / "sparse"),
            "out": str(self.out / "eval"),
            "overwrite": True,
            "device": self.device.type,
        }
        recipe = load_recipe(EvaluateRecipe, "ruler", words, flags, verb="evaluate")
        done = run(plan(recipe))
        print(done.text(), flush=True)
        report = done.report
        for length in self.given.lengths:
            for policy in dict.fromkeys(unit["policy"] for unit in report["units"]):
                self.session.row(**_mean(report["units"], length, policy))


def _mean(units: list[dict[str, Any]], length: int, policy: str) -> dict[str, Any]:
    """Mean score of the tasks measured at one length under one policy."""
    own = [unit for unit in units if unit["length"] == length and unit["policy"] == policy]
    scores = [unit["metrics"]["score"]["value"] for unit in own]
    return {
        "length": length,
        "policy": policy,
        "score": float(np.mean(scores)) if scores else None,
        "tasks": len(scores),
    }


def stretched(base: Path, place: Path, length: int) -> Path:
    """The same weights, in `place`, with rotary positions for `length` tokens, by YaRN."""
    config = AutoConfig.from_pretrained(base)
    factor = length / config.max_position_embeddings
    if factor <= 1:
        return base
    stretch(config, factor)
    shutil.copytree(base, place, dirs_exist_ok=True)
    config.save_pretrained(place)
    return place


def samples(model: Path, text: str, count: int, *, processes: int) -> list[str]:
    """Short samples of the needle tasks with their answers, half of them as a conversation.

    Args:
        model: folder with the tokenizer that lengths are counted in.
        text: file or folder of what needles are hidden in.
        processes: that make them; only the order of the samples depends on it.
    Raises:
        ValueError: the text is too short for a sample.
    """
    parts = [(model, text, number, count, processes) for number in range(processes)]
    if processes == 1:
        return _samples(parts[0])
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        return [line for lines in pool.map(_samples, parts) for line in lines]


def _samples(part: tuple[Path, str, int, int, int]) -> list[str]:
    folder, text, first, count, step = part
    tokenizer = load_tokenizer(folder)
    hay = build_haystack({"text": [text], "seed": SEED}, tokenizer)
    tasks = [catalogue()[name].extra.get("options", {}) for name in catalogue()[GROUP].members]
    made = []
    for number in range(first, count, step):
        rng = np.random.default_rng([SEED, number])
        room = int(np.exp(rng.uniform(*np.log(TOKENS))))
        options = tasks[number % len(tasks)]
        try:
            sample = ruler_samples.niah(rng, hay, room, **options)
        except ValueError:  # several UUIDs take more than that
            sample = ruler_samples.niah(rng, hay, TOKENS[1], **options)
        answer = f"{sample['gen_prefix']} {', '.join(sample['outputs'])}."
        made.append(_asked(tokenizer, sample["input"], chat=rng.random() < 0.5) + answer)
    return made


def _asked(tokenizer: Any, prompt: str, *, chat: bool) -> str:
    """The prompt as plain text, or as the first turn of a conversation."""
    if not chat or not tokenizer.chat_template:
        return prompt + "\n"
    turns = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


if __name__ == "__main__":
    main()
