"""Teach a base to recall, convert it, compare what is kept, train it back: one table.

    python -m experiments.conversion OUT \\
        --train books/train-00.jsonl.zst books/train-01.jsonl.zst \\
        --held-out books/validation.jsonl.zst [--seconds 540] [--keep-base FOLDER]

A base of 26M parameters is trained at 4096 tokens by the recipes small-1-short and small-2-long. It
is converted at a sixteenth and an eighth of its context, an eighth of that window; dense, window,
random and SparseK are compared at equal slots; scorers alone, then all weights, are trained for
less than a tenth of the base's tokens (small-3-scorers, small-3-all), and a plain window the same
way. Measured are perplexity of windows of unseen novels (whole, and their last quarter) and recall
of 1, 4 and 16 facts in the phrasings that calibration knows, in those that only the base knows
(held out), and in those that nobody knows (unseen).

OUT/results.json holds everything, also of a run that was cut off; every command it ran is printed
as one would type it. `--keep-base` writes the base in bf16 shards of less than 15 MB, without its
tokenizer (the bundled one); `--base FOLDER` starts from such a folder, or from `tiny`, and
`--base-steps` says how long it learned (without it, fine-tuning takes the steps of its recipe).
`--shares` and `--recipes` choose what is made of it, `--length` how long calibration and what is
measured are, `--set` gives words to every fine-tuning (sequence_length=... among them). `--smoke`
is a toy run of about a minute on a CPU.

Time on one H100: about 1 minute for stage 1, 2 to 3 for stage 2, 3 for the rest.
"""

import argparse
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from experiments.steps import Steps
from experiments.suite import (
    WINDOW_SHARE,
    Suite,
    conversion_words,
    load,
    recall_text,
    share_closed,
    short_recall,
    with_tokenizer,
)
from sparsek_cli.benchmarks.session import Session, arguments
from sparsek_cli.devices import choose_device, choose_dtype
from sparsek_cli.evaluation.policies.registry import DENSE
from sparsek_cli.recipes.load import load_recipe
from sparsek_cli.recipes.schema_finetune import FinetuneRecipe

SINKS = 4
SHARES = (16, 8)
RECIPES = ("small-3-scorers", "small-3-all")
POLICIES = (DENSE, "window", "random", "sparsek")
COLUMNS = (
    "model", "slots", "policy", "ppl_last", "ppl", "closed", "calibration", "held_out", "unseen",
)  # fmt: skip
# Stage 2 does this share of stage 1's tokens per second: attention to 4096 tokens costs more.
LONG_RATE = 0.6
# Share of the time budget for the base.
BASE_SHARE = 0.45
# Percent of the questions about short documents that must be answered before stage 2.
ENOUGH = 80.0
STEP_TOKENS = 65_536


@dataclass(frozen=True)
class Scale:
    """How large everything is.

    Attributes:
        length: tokens of a window and of a question's document.
        windows, questions: how many of each are measured.
        calibrate_tokens: text for calibration.
        batch_tokens: that go through a model together when measuring.
        short, long, tune: words for the recipes of the two stages and of fine-tuning.
    """

    length: int = 4096
    windows: int = 128
    questions: int = 96
    calibrate_tokens: int = 262_144
    batch_tokens: int = 65_536
    short: tuple[str, ...] = ()
    long: tuple[str, ...] = ()
    tune: tuple[str, ...] = ()


_SMALL = ("data_workers=0", "batch_size=2", "micro_batch_size=2", "log_steps=2")
SMOKE = Scale(
    length=512,
    windows=2,
    questions=2,
    calibrate_tokens=8 * 512,
    batch_tokens=1024,
    short=(
        *_SMALL, "steps=4", "warmup=1", "architecture.settings.hidden_size=64",
        "architecture.settings.intermediate_size=96", "architecture.settings.num_hidden_layers=2",
    ),
    long=(*_SMALL, "steps=2", "sequence_length=512", "warmup=1"),
    tune=(*_SMALL, "steps=2", "sequence_length=512", "evaluation.sequences=2"),
)  # fmt: skip


def main() -> None:
    given = _arguments()
    scale = SMOKE if given.smoke else Scale(length=given.length)
    session = Session.of(given)
    Experiment(session, given, scale).run()


def _arguments() -> argparse.Namespace:
    parser = arguments("experiments.conversion", __doc__, seconds=540)
    parser.add_argument("--train", nargs="+", required=True, help="text to train on")
    parser.add_argument("--held-out", required=True, help="text that is only measured")
    parser.add_argument("--base", help="use this base (a folder, or tiny) instead of training one")
    parser.add_argument("--keep-base", help="folder to write the base to, in small shards")
    parser.add_argument("--base-steps", type=int, help="steps of 65,536 tokens that --base learned")
    parser.add_argument(
        "--shares", nargs="+", type=int, default=SHARES, metavar="N",
        help="slots are 1/N of the length",
    )  # fmt: skip
    parser.add_argument("--recipes", nargs="*", default=RECIPES, help="to fine-tune with")
    parser.add_argument("--length", type=int, default=4096, help="tokens of windows and documents")
    parser.add_argument("--set", nargs="+", default=[], metavar="WORD", help="for fine-tuning")
    return parser.parse_args()


class Experiment:
    """The phases in order; each uses what earlier ones left."""

    def __init__(self, session: Session, given: argparse.Namespace, scale: Scale):
        self.session, self.given, self.scale = session, given, scale
        self.out = session.folder
        self.device = choose_device(given.device)
        self.dtype = choose_dtype("auto", self.device)
        self.steps = Steps(session, [f"device={self.device.type}"])
        self.files = f"data.novels.files={json.dumps(list(given.train))}"
        self.words = [*scale.tune, *given.set]
        self.suite: Suite | None = None
        self.rows: dict[tuple[str, int, str], dict[str, Any]] = {}
        self.base_steps: int | None = given.base_steps

    def run(self) -> None:
        """All phases, then the table."""
        say = self.session
        base = say.run("base", self.base)
        if base is not None:
            if self.given.keep_base:
                say.run("keep the base", partial(keep, base, Path(self.given.keep_base)))
            self.suite = say.run("questions and windows", partial(self.make_suite, base))
        if self.suite is not None:
            shares, recipes = self.given.shares, self.given.recipes
            for share in shares:
                say.run(f"convert at 1/{share}", partial(self.convert, base, share), needs=20)
            for share in shares:
                for recipe in recipes:
                    name = f"{recipe} at 1/{share}"
                    say.run(name, partial(self.tune, recipe, share), needs=30)
            if "small-3-all" in recipes:
                name = f"small-3-all of a window at 1/{shares[0]}"
                say.run(name, partial(self.tune_window, base, shares[0]), needs=30)
        print(self.session.table(COLUMNS), flush=True)
        self.session.say(f"wrote {self.out / 'results.json'}")

    # The base.

    def base(self) -> Path:
        """A dense model that recalls: the one that was named, or a new one."""
        if self.given.base:
            return with_tokenizer(self.given.base, self.out / "base")
        until = (1 - BASE_SHARE) * self.session.left
        short = self.out / "short-1"
        first = self.short_stage(short)
        if self.recalls(short) < ENOUGH and not self.given.smoke:
            self.session.say("it does not recall yet: once more")
            again = self.out / "short-2"
            self.short_stage(again, "seed=10", model=short)
            self.recalls(again)
            short = again
        words = list(self.scale.long)
        if not words:
            seconds = max(60.0, self.session.left - until)
            fits = int(seconds * LONG_RATE * first.tokens_per_second / STEP_TOKENS)
            words = [f"steps={max(300, min(1300, fits))}", f"minutes={1.3 * seconds / 60:.3f}"]
        out = self.out / "base"
        second = self.steps.finetune("small-2-long", out, self.files, *words, model=short)
        self.base_steps = first.steps + second.steps
        return out

    def short_stage(self, out: Path, *words: str, model: Path | None = None) -> Any:
        """Stage 1, or more of it from `model`."""
        limit = f"minutes={0.4 * BASE_SHARE * self.given.seconds / 60:.3f}"
        start = () if model is None else ("init=pretrained", "warmup=20")
        return self.steps.finetune(
            "small-1-short", out, self.files, limit, *self.scale.short, *start, *words, model=model
        )

    def recalls(self, base: Path) -> float:
        """Recall of two facts in a short document, in percent."""
        model = load(base, self.device, self.dtype)
        percent = short_recall(model, base, self.given.held_out)
        self.session.say(f"=> recall of 2 facts in 256 tokens: {percent:.0f} %")
        return percent

    def make_suite(self, base: Path) -> Suite:
        suite = Suite.of(
            base, self.given.held_out, length=self.scale.length, windows_=self.scale.windows,
            questions=self.scale.questions, batch_tokens=self.scale.batch_tokens,
        )  # fmt: skip
        count = self.scale.questions
        self.session.say(f"{len(suite.rows)} windows, {count} questions of each kind")
        return suite

    # Conversion and training.

    def convert(self, base: Path, share: int) -> None:
        """Calibrated scorers at length / share slots; all policies on the same weights."""
        self.steps.convert(base, self.folder(share), self.request(share))
        policies = POLICIES if share == self.given.shares[0] else POLICIES[1:]
        self.compare("calibrated", self.folder(share), share, policies)

    def request(self, share: int) -> dict[str, Any]:
        """Words of `sparsek convert`."""
        slots = self.scale.length // share
        return conversion_words(
            slots, window=WINDOW_SHARE, sinks=SINKS, calibrate=self.given.train[0],
            length=self.scale.length, tokens=self.scale.calibrate_tokens, device=self.device.type,
        )  # fmt: skip

    def tune(self, recipe: str, share: int) -> None:
        """Trains the conversion and measures it; with all weights trained, densely too."""
        name = recipe.removeprefix("small-3-")
        out = self.folder(share).with_name(f"{self.folder(share).name}-{name}")
        self.steps.finetune(
            recipe, out, self.files, *self.limits(recipe), *self.words,
            model=self.folder(share),
        )  # fmt: skip
        self.compare(name, out, share, ("sparsek",) if name == "scorers" else ("sparsek", DENSE))

    def tune_window(self, base: Path, share: int) -> None:
        """What the same training does for a plain window, without stand-ins, at the same slots."""
        slots, name = self.scale.length // share, self.folder(share).name
        bare = self.steps.bare(base, self.out / f"{name}-bare", self.request(share))
        out = self.out / f"{name}-window"
        self.steps.finetune(
            "small-3-all", out, self.files, *self.limits("small-3-all"), *self.words,
            "sparsek.topk=0", f"sparsek.window={slots - SINKS}", model=bare,
        )  # fmt: skip
        self.compare("all, as window", out, share, ("sparsek",))

    def limits(self, recipe: str) -> list[str]:
        """Time, and the tenth of the base's steps that fine-tuning may take."""
        words = [f"minutes={max(10.0, 0.6 * self.session.left) / 60:.3f}"]
        if self.base_steps is not None:
            own = load_recipe(FinetuneRecipe, recipe, verb="finetune").steps
            words.append(f"steps={max(1, min(own, self.base_steps // 10))}")
        return words

    def folder(self, share: int) -> Path:
        return self.out / f"sparse-{share}"

    def compare(self, name: str, folder: Path, share: int, policies: tuple[str, ...]) -> None:
        """A row per policy; `closed` refers to dense and window of the calibrated model."""
        model = load(folder, self.device, self.dtype)
        slots = self.scale.length // share
        for policy in policies:
            row = self.suite.measure(model, policy)
            self.rows[name, share, policy] = row
            dense = self.rows.get(("calibrated", self.given.shares[0], DENSE))
            window = self.rows.get(("calibrated", share, "window"))
            closed = share_closed(row, dense, window) if dense and window else None
            self.session.row(
                model=name,
                slots=slots if policy != DENSE else self.scale.length,
                policy=policy,
                **{key: row[key] for key in ("ppl_last", "ppl", "loss_last", "loss")},
                closed=closed,
                **recall_text(row["recall"]),
                recall=row["recall"],
                loss_by_position=row["loss_by_position"],
            )


def keep(base: Path, folder: Path) -> None:
    """The base in bf16, in shards of less than 15 MB, without its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="14MB")


if __name__ == "__main__":
    main()
