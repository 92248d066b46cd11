"""What calibration owes to each of its parts: one row per change, everything else as it is.

    python -m experiments.ablations OUT --held-out books/validation.jsonl.zst \\
        [--train books/train-00.jsonl.zst] [--model DIR] [--rows NAME ...] [--seconds 290]

A base is converted once per row, calibration only, at `--share` of `--length`, `--window` of that
being the newest keys, with one thing changed in the request (the words shown), with another kind of
scorer, or with outputs patched (experiments/variants/patches.py), or with slots for means of what
was evicted (experiments/variants/summaries.py); these have no stand-ins, and row `no-stand-ins` is
what they are compared with. Measured are perplexity of
windows of unseen novels, the share of the loss between a window of the same slots and dense
attention that is closed (on the last quarter of the windows), and recall of 1, 4 and 16 facts in
phrasings that calibration knows and in others that only the base knows. Dense and window are
measured once. Rows `seed` say how much of a difference is chance.

Row `ceiling` shows what selection alone could reach with the default's shares: each query sees the
keys that are looked at most from then on (experiments/ceiling.py). Rows `future` keep the measured
future attention as one score for the whole text, with shares and slopes per head found from it.

What wins becomes the default in recipes/schema_convert.py or conversion/calibrate/method.py;
`--set` gives words to every row, to see what another default changes.

OUT/results.json holds everything; the same command goes on where an earlier one stopped.
`--smoke`: toy sizes. Time on one H100: about 10 s a row.
"""

import argparse
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from experiments import ceiling
from experiments.steps import Steps, of_method
from experiments.suite import (
    SINKS,
    WINDOW_SHARE,
    Suite,
    conversion_arguments,
    conversion_words,
    load,
    recall_text,
    share_closed,
    weights_folder,
    with_tokenizer,
)
from experiments.variants import patches, summaries
from experiments.variants.scorers import FITS, in_place_of_linear
from sparsek_cli.benchmarks.session import Session, arguments
from sparsek_cli.conversion.calibrate.run import search
from sparsek_cli.conversion.plan import plan as make_plan
from sparsek_cli.data.corpus import load_corpus
from sparsek_cli.devices import choose_device, choose_dtype
from sparsek_cli.evaluation.policies.registry import DENSE, OWN
from sparsek_cli.loading import load_tokenizer
from sparsek_cli.recipes.load import load_recipe
from sparsek_cli.recipes.schema_convert import ConvertRecipe
from sparsek_cli.reporter import Silent
from sparsek_cli.training.measure import windows

SPLITS = ("calibration", "held_out")
COLUMNS = ("row", "changed", "closed", "over_default", "ppl_last", *SPLITS, "text_loss", "seconds")
# What may differ between a run and its continuation.
FREE = ("rows", "seconds", "out")

# By name: the words of `sparsek convert` that differ, and below "method." what else of calibration
# does (conversion/calibrate/method.py). "slots" keys share out the same total: share of the window,
# sinks. "scorer" names one of `scorers.FITS`.
ROWS: dict[str, dict[str, Any]] = {
    "default": {},
    "seed": {"seed": 1},
    "documents-mixed": {"method.documents": "mixed"},
    "documents-mixed-seed": {"method.documents": "mixed", "seed": 1},
    "documents-told-and-asked": {"method.documents": "told_and_asked"},
    "documents-retold-and-asked": {"method.documents": "retold_and_asked"},
    "documents-text-and-asked": {"method.documents": "text_and_asked"},
    "documents-all-in-turn": {"method.documents": "all_in_turn"},
    "documents-statements": {"method.documents": "statements"},
    "documents-questions": {"method.documents": "questions"},
    "documents-none": {"method.documents": "none"},
    "scorer-linear": {"method.scorer": "linear"},
    "scorer-linear-seed": {"method.scorer": "linear", "seed": 1},
    "scorer-keys-values": {"scorer": "keys-values"},
    "scorer-leaving": {"scorer": "leaving"},
    "patch-layer": {"patch": "layer"},
    "patch-head": {"patch": "head"},
    "summary-1": {"summary": (1, 0.0)},
    "summary-2": {"summary": (2, 0.0)},
    "summary-2-raised": {"summary": (2, 1.0)},
    "summary-4": {"summary": (4, 0.0)},
    "no-stand-ins": {"stand_ins": False},
    "ceiling": {"ceiling": True},
    "future": {"scorer": "future"},
    "future-slope-0": {"scorer": "future", "method.slopes": [0]},
    "target-mean": {"method.target": "mean"},
    "target-p99": {"method.target": "p99"},
    "budgets-uniform": {"budgets": "uniform"},
    "sizes-narrow": {"method.sizes": [0.25, 0.5, 1, 2, 4]},
    "slope-0": {"method.slopes": [0]},
    "slope-0.2": {"method.slopes": [0.2]},
    "slope-0.7": {"method.slopes": [0.7]},
    "slope-2.5": {"method.slopes": [2.5]},
    "slopes-finer": {"method.slopes": [0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2]},
    "window-1/4": {"slots.window": 1 / 4},
    "window-1/2": {"slots.window": 1 / 2},
    "window-3/4": {"slots.window": 3 / 4},
    "sinks-0": {"slots.sinks": 0},
    "sinks-16": {"slots.sinks": 16},
    "map-text": {"method.maps": ["text"]},
    "map-all": {"method.maps": ["all"]},
    "map-answers": {"method.maps": ["answers"]},
    "map-blend": {"method.maps": ["blend"], "method.scorer": "linear"},
    "recall-0": {"recall": 0.0},
    "recall-0.5": {"recall": 0.5},
    "recall-1": {"recall": 1.0},
    "text-quarter": {"tokens": 1 / 4},
    "text-4-times": {"tokens": 4},
    "text-prose": {"calibrate": "auto"},
}


def main() -> None:
    given = _arguments()
    session = Session.of(given, FREE)
    with weights_folder(session.folder) as weights:
        Experiment(session, given, weights).run()


def _arguments() -> argparse.Namespace:
    parser = arguments("experiments.ablations", __doc__, seconds=290)
    conversion_arguments(parser)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME")
    parser.add_argument("--share", type=int, default=16, help="slots are 1/SHARE of the length")
    parser.add_argument("--window", type=float, default=WINDOW_SHARE, help="share of the slots")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="for every row")
    given = parser.parse_args()
    if given.smoke:
        given.length, given.tokens, given.windows, given.questions = 512, 4096, 2, 2
    return given


class Experiment:
    """Dense and window once, then one conversion per row."""

    def __init__(self, session: Session, given: argparse.Namespace, weights: Path):
        self.session, self.given = session, given
        self.device = choose_device(given.device)
        self.dtype = choose_dtype("auto", self.device)
        self.steps = Steps(session, [])
        self.weights, self.model = weights, weights / "model"

    def run(self) -> None:
        """All rows that are not there yet, then the table."""
        self.base = with_tokenizer(self.given.model, self.weights / "base")
        self.suite = Suite.of(
            self.base, self.given.held_out, length=self.given.length, windows_=self.given.windows,
            questions=self.given.questions, batch_tokens=65_536, splits=SPLITS,
        )  # fmt: skip
        self.session.say(f"{len(self.suite.rows)} windows, {self.given.questions} of each question")
        self.session.run("dense and window", self.references)
        for name in self.given.rows:
            if not self.given.train and (name == "text-prose" or "patch" in ROWS[name]):
                continue  # the default then; or text that a patch is fitted to
            needs = 1.5 * (self.named("default") or {}).get("seconds", 0)
            self.session.run(name, partial(self.row, name), needs=needs)
        print(self.session.table(COLUMNS), flush=True)
        self.session.say(f"wrote {self.session.folder / 'results.json'}")

    def rows(self) -> list[dict[str, Any]]:
        return self.session.record["rows"]

    def named(self, name: str) -> dict[str, Any] | None:
        return next((row for row in self.rows() if row["row"] == name), None)

    def references(self) -> None:
        """Dense attention, and a window of the same slots."""
        self.steps.convert(self.base, self.model, self.request("default") | {"calibrate": "none"})
        model = load(self.model, self.device, self.dtype)
        for policy in (DENSE, "window", "random"):
            self.add(policy, None, self.suite.measure(model, policy))

    def request(self, name: str) -> dict[str, Any]:
        """The words of `sparsek convert` for a row, and `Method`'s fields below "method."."""
        changes = dict(ROWS[name])
        others = [changes.pop(key, None) for key in ("scorer", "patch", "summary", "ceiling")]
        if any(others):  # scorers or attention of their own, which know no stand-ins
            changes["stand_ins"] = False
        words = conversion_words(
            self.given.length // self.given.share,
            window=changes.pop("slots.window", self.given.window),
            sinks=changes.pop("slots.sinks", SINKS),
            calibrate=self.given.train or "auto",
            length=self.given.length,
            tokens=int(self.given.tokens * changes.pop("tokens", 1)),
            device=self.device.type,
        )
        return {
            **words,
            **{key: yaml.safe_load(value) for key, _, value in self._set()},
            **changes,
        }

    def _set(self) -> list[tuple[str, str, str]]:
        """The words of --set."""
        return [word.partition("=") for word in self.given.set]

    def row(self, name: str) -> None:
        begun = self.session.left
        scorer = ROWS[name].get("scorer")
        if scorer is None:
            done = self.steps.convert(self.base, self.model, self.request(name))
            model = load(self.model, self.device, self.dtype)
            with self.altered(model, ROWS[name]):
                measured = self.alone(name).measure(model, OWN)
            text_loss = done.calibration["text_loss"]
        else:
            text_loss, measured = self.with_scorer(name, FITS[scorer])
        seconds = begun - self.session.left
        self.add(name, ROWS[name], measured, text_loss=text_loss, seconds=seconds)

    def alone(self, name: str) -> Suite:
        """The suite, one sequence at a time where padding would be a token like others."""
        row = ROWS[name]
        alone = "ceiling" in row or "summary" in row or row.get("scorer") == "future"
        return replace(self.suite, batch_tokens=1) if alone else self.suite

    def altered(self, model: Any, row: dict[str, Any]) -> AbstractContextManager:
        """Attention as a row wants it; patches are fitted to an eighth of calibration's text."""
        if "ceiling" in row:
            return ceiling.applied()
        if "summary" in row:
            return summaries.applied(*row["summary"])
        if "patch" not in row:
            return nullcontext()
        corpus = load_corpus(self.given.train, load_tokenizer(self.base))
        count = max(4, self.given.tokens // self.given.length // 8)
        rows = windows(corpus, self.given.length, count)
        return patches.patched(patches.fit(model, torch.from_numpy(rows), row["patch"]))

    def with_scorer(self, name: str, fit: Any) -> tuple[float, dict[str, Any]]:
        """Loss in calibration's text and what is measured, with scorers of another kind."""
        words, method = of_method(self.request(name))
        self.steps.convert(self.base, self.model, words | {"calibrate": "none"})
        recipe = load_recipe(
            ConvertRecipe, None, [f"{key}={value}" for key, value in words.items()],
            {"model": str(self.base), "out": str(self.model), "overwrite": True},
        )  # fmt: skip
        plan = make_plan(recipe, method)
        found = search(plan, Silent(), fit)
        model = load(self.model, self.device, self.dtype)
        with in_place_of_linear(model, [layer.maps for layer in found.layers], found.choices):
            return found.report["text_loss"], self.alone(name).measure(model, OWN)

    def add(
        self, name: str, changes: dict[str, Any] | None, measured: dict[str, Any], **more: Any
    ) -> None:
        dense, window = self.named(DENSE), self.named("window")
        closed = share_closed(measured, dense, window) if dense and window else None
        default = (self.named("default") or {}).get("closed")
        self.session.row(
            row=name,
            changed=" ".join(f"{key}={value}" for key, value in (changes or {}).items()),
            closed=closed,
            over_default=None if closed is None or default is None else closed - default,
            **{key: measured[key] for key in ("ppl_last", "ppl", "loss_last", "loss")},
            **recall_text(measured["recall"]),
            recall=measured["recall"],
            **more,
        )


if __name__ == "__main__":
    main()
