"""What trains a conversion back: one row per choice of objective, rates and text.

    python -m experiments.tuning OUT --model BASE \\
        --train books/train-00.jsonl.zst --tune books/train-03.jsonl.zst \\
        --held-out books/validation.jsonl.zst [--rows NAME ...] [--seconds 580]

A base is converted once (calibrated on `--train`, at `--share` of `--length`) and trained for
`--steps` by a recipe (small-3-all) on `--tune`, text that the base should not have read, with the
words of each row. Measured are perplexity of windows of unseen novels and recall of 1, 4 and 16
facts in phrasings that training asks and in others. "closed" is the share of the loss between a
window of the same slots and dense attention, both as they were before training, that is gone on the
last quarter of the windows. Some rows train dense attention and a plain window the same way:
"alike" is the share between those two, for the row that has their words. No window has stand-ins,
trained or not: one that is trained starts from a conversion of its own ("bare"). Others are
calibrated again after training (`sparsek convert --again`) and measured once more, as "NAME,
again"; `--again` names which, by default all. "NAME, dense self" is what was trained, attending
densely. Rows `adapt` are that recipe's words with one thing changed: what is minimised, or how
scorers learn. With `--also 8` what is calibrated again is so at an eighth of the length, too
("NAME, again at 1/8").

`--set` gives words to every row. OUT/results.json holds everything; the same command goes on where
an earlier one stopped. `--smoke`: toy sizes. Time on one H100: about 60 s a row.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

from experiments.steps import Steps, gated, of_variants
from experiments.suite import WINDOW_SHARE, Suite, load, recall_text, share_closed, with_tokenizer
from sparsek_cli.benchmarks.session import Session, arguments
from sparsek_cli.conversion.calibrate.method import DOCUMENTS
from sparsek_cli.devices import choose_device, choose_dtype
from sparsek_cli.evaluation.policies.registry import DENSE, OWN
from sparsek_cli.models import budget

SINKS = 4
SPLITS = ("calibration", "held_out")
COLUMNS = ("row", "closed", "alike", "ppl_last", "ppl", *SPLITS)
# What may differ between a run and its continuation.
FREE = ("rows", "again", "documents", "seconds", "out")
CONTROLS = DENSE_CONTROL, WINDOW_CONTROL = " dense", " window"
_AGAIN = ", again"
# Rows that dense attention and calibration do not read as they were trained.
_PREFIX_GATES = "prefix gates"
_TEXT = ("objective.lm=1", "objective.distill=0")
_MORE_TEXT = ("data.needles.weight=0.15", "data.copies.weight=0.05", "data.novels.weight=0.8")

# By name: words of `sparsek finetune`. A name that ends in " dense" or " window" trains that.
ROWS: dict[str, tuple[str, ...]] = {
    "recipe": (),
    "recipe dense": (),
    "recipe window": (),
    "text 3e-5": (*_TEXT, "learning_rate=3e-5"),
    "text 1e-4": (*_TEXT, "learning_rate=1e-4"),
    "text 3e-4": (*_TEXT, "learning_rate=3e-4"),
    "text 3e-4 dense": (*_TEXT, "learning_rate=3e-4"),
    "text 3e-4 window": (*_TEXT, "learning_rate=3e-4"),
    "text 1e-3": (*_TEXT, "learning_rate=1e-3"),
    "text 3e-4, scorers 1e-4": (*_TEXT, "learning_rate=3e-4", "scorer_learning_rate=1e-4"),
    "text 3e-4, more novels": (*_TEXT, *_MORE_TEXT, "learning_rate=3e-4"),
    "distill 3e-4": ("objective.lm=0", "objective.distill=1", "learning_rate=3e-4"),
    "both 3e-4": ("objective.lm=1", "objective.distill=1", "learning_rate=3e-4"),
}
_ADAPT = (
    "objective.lm=0.1", "objective.distill=1", "scorer_training=concurrent",
    "budgets=[32,16,8,4]", "learning_rate=1e-4", "min_learning_rate=0.2",
    "scorer_learning_rate=1e-4",
)  # fmt: skip
_WITH_DENSE = "budgets=[32,16,8,4,1]"
_TEXT_TOO = (
    _WITH_DENSE, "objective.lm=1", "learning_rate=3e-4", "min_learning_rate=0.1",
    "data.needles.weight=0.3", "data.novels.weight=0.6",
)  # fmt: skip
_FEW_SPARSE = ("budgets=[16,8,1,1,1,1]", "objective.distill=0.25")
ROWS |= {
    "adapt": _ADAPT,
    "adapt dense": _ADAPT,
    "adapt window": _ADAPT,
    "adapt, text": (*_ADAPT, *_TEXT),
    "adapt, text dense": (*_ADAPT, *_TEXT),
    "adapt, text window": (*_ADAPT, *_TEXT),
    "adapt, KL": (*_ADAPT, "objective.lm=0"),
    "adapt, frozen": (*_ADAPT, "scorer_training=frozen"),
    "adapt, refit": (*_ADAPT, "scorer_training=refit"),
    "adapt, gates": (*_ADAPT, "scorer_training=gates"),
    "adapt, log gates": (*_ADAPT, "scorer_training=gates", "sparsek.gate=log"),
    "adapt, prefix gates": (*_ADAPT, "scorer_training=gates", "prefix_gates=1"),
    "adapt, faint prefix gates": (*_ADAPT, "scorer_training=gates", "prefix_gates=0.1"),
    "adapt, one budget": (*_ADAPT, "budgets=[]"),
    "adapt, outputs first": (*_ADAPT, "outputs=1"),
    "adapt, dense steps": (*_ADAPT, _WITH_DENSE),
    "adapt, text too": (*_ADAPT, *_TEXT_TOO),
    "adapt, text too dense": (*_ADAPT, *_TEXT_TOO),
    "adapt, text too window": (*_ADAPT, *_TEXT_TOO),
    "adapt, few sparse steps": (*_ADAPT, *_TEXT_TOO, *_FEW_SPARSE),
    "adapt, few sparse steps, gates": (
        *_ADAPT,
        *_TEXT_TOO,
        *_FEW_SPARSE,
        "scorer_training=gates",
    ),
    "adapt, few sparse steps dense": (*_ADAPT, *_TEXT_TOO, *_FEW_SPARSE),
    "adapt, few sparse steps window": (*_ADAPT, *_TEXT_TOO, *_FEW_SPARSE),
}
_SMOKE = (
    "data_workers=0", "batch_size=2", "micro_batch_size=2", "sequence_length=512",
    "evaluation.held_out=0", "evaluation.questions=0",
)  # fmt: skip


def main() -> None:
    given = _arguments()
    session = Session.of(given, FREE)
    Experiment(session, given).run()


def _arguments() -> argparse.Namespace:
    parser = arguments("experiments.tuning", __doc__, seconds=580)
    parser.add_argument("--model", required=True, help="base to convert: a folder, or tiny")
    parser.add_argument("--train", required=True, help="text to calibrate on")
    parser.add_argument("--tune", nargs="+", required=True, help="text to train on")
    parser.add_argument("--held-out", required=True, help="text that is only measured")
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=list(ROWS), metavar="NAME")
    parser.add_argument("--recipe", default="small-3-all", help="of every row")
    parser.add_argument("--steps", type=int, default=200, help="of training")
    parser.add_argument("--length", type=int, default=4096, help="tokens of windows and documents")
    parser.add_argument("--share", type=int, default=16, help="slots are 1/SHARE of the length")
    parser.add_argument("--tokens", type=int, default=262_144, help="text to calibrate on")
    parser.add_argument("--windows", type=int, default=128, help="windows measured")
    parser.add_argument("--questions", type=int, default=96, help="of each kind and number")
    parser.add_argument("--again", nargs="*", metavar="NAME", help="rows to calibrate again")
    parser.add_argument(
        "--documents", nargs="*", choices=DOCUMENTS, default=[], metavar="KIND",
        help="further kinds to calibrate again with, see calibrate/method.py",
    )  # fmt: skip
    parser.add_argument("--also", type=int, metavar="N", help="calibrate again at 1/N, too")
    parser.add_argument("--convert", nargs="+", default=[], metavar="WORD", help="for converting")
    parser.add_argument("--set", nargs="+", default=[], metavar="WORD", help="for every row")
    given = parser.parse_args()
    if given.smoke:
        given.length, given.tokens, given.windows, given.questions = 512, 4096, 2, 2
        given.steps = 2
        given.set += _SMOKE
    return given


class Experiment:
    """One conversion, its start under three policies, then one training per row."""

    def __init__(self, session: Session, given: argparse.Namespace):
        self.session, self.given = session, given
        self.device = choose_device(given.device)
        self.dtype = choose_dtype("auto", self.device)
        self.steps = Steps(session, [f"device={self.device.type}"])
        self.sparse = session.folder / "sparse"
        self.slots = given.length // given.share

    def run(self) -> None:
        """All rows that are not there yet, then the table."""
        self.base = with_tokenizer(self.given.model, self.session.folder / "base")
        self.suite = Suite.of(
            self.base, self.given.held_out, length=self.given.length, windows_=self.given.windows,
            questions=self.given.questions, batch_tokens=65_536, splits=SPLITS,
        )  # fmt: skip
        self.session.run("convert", self.convert)
        if self.session.run("start", self.start) is None and not self.named(OWN):
            return
        for name in self.given.rows:
            self.session.run(name, partial(self.row, name), needs=20)
            again = self.given.again is None or name in self.given.again
            if again and not name.endswith((*CONTROLS, _PREFIX_GATES)):
                for share in filter(None, (self.given.share, self.given.also)):
                    for kind in (None, *self.given.documents):
                        label = self.label(name, share, kind)
                        self.session.run(label, partial(self.again, name, share, kind), needs=20)
        self.compare_alike()
        print(self.session.table(COLUMNS), flush=True)
        self.session.say(f"wrote {self.session.folder / 'results.json'}")

    def named(self, name: str) -> dict[str, Any] | None:
        rows = self.session.record["rows"]
        return next((row for row in rows if row["row"] == name), None)

    def convert(self) -> None:
        """Calibrated scorers, the same for every row."""
        settings = self.budget(self.given.share) | self.calibration()
        self.steps.convert(self.base, self.sparse, settings)

    def budget(self, share: int) -> dict[str, int]:
        """Keys of a conversion to 1/share of the length."""
        slots = self.given.length // share
        window = int(slots * WINDOW_SHARE)
        return {"topk": slots - window - SINKS, "window": window, "sinks": SINKS}

    def at(self, share: int) -> str:
        """What names of rows at another share end in."""
        return "" if share == self.given.share else f" at 1/{share}"

    def calibration(self) -> dict[str, Any]:
        """Words for `sparsek convert`."""
        return {
            "calibrate": self.given.train,
            "calibrate_length": self.given.length,
            "calibrate_tokens": self.given.tokens,
            "device": self.device.type,
            **dict(word.split("=", 1) for word in self.given.convert),
        }

    def start(self) -> bool:
        """What there is before training."""
        model = load(self.sparse, self.device, self.dtype)
        for policy in (DENSE, "window", OWN):
            self.add(policy, (), self.suite.measure(model, policy))
        if self.given.also:
            with budget(model, **self.budget(self.given.also)):
                measured = self.suite.measure(model, "window")
            self.add(f"window{self.at(self.given.also)}", (), measured)
        return True

    def start_of(self, name: str) -> Path:
        """What a row trains: the conversion, or, for a window, one without stand-ins."""
        if not name.endswith(WINDOW_CONTROL):
            return self.sparse
        settings = self.budget(self.given.share) | self.calibration()
        return self.steps.bare(self.base, self.session.folder / "bare", settings)

    def row(self, name: str) -> None:
        words, out = ROWS[name], self.folder(name)
        result = self.steps.finetune(
            self.given.recipe, out, f"data.novels.files={json.dumps(self.given.tune)}",
            f"steps={self.given.steps}", *words, *self.given.set, *self.attention(name),
            model=self.start_of(name),
        )  # fmt: skip
        model = load(out, self.device, self.dtype)
        with gated(of_variants(words)[1]):
            measured = self.suite.measure(model, OWN)
        self.add(name, words, measured, tokens_per_second=result.tokens_per_second)
        if not name.endswith((*CONTROLS, _PREFIX_GATES)):
            self.add(f"{name}, dense self", words, self.suite.measure(model, DENSE))

    def label(self, name: str, share: int, documents: str | None) -> str:
        """Of a row that is calibrated again; None: with the documents that calibration takes."""
        return f"{name}{_AGAIN}{self.at(share)}" + (f", {documents}" if documents else "")

    def again(self, name: str, share: int, documents: str | None) -> None:
        """What a row trained, with scorers fitted to the weights it has now, at 1/share."""
        out, at = self.session.folder / "again", self.at(share)
        settings = self.calibration() | {"again": True} | (self.budget(share) if at else {})
        if documents:
            settings["method.documents"] = documents
        self.steps.convert(self.folder(name), out, settings)
        measured = self.suite.measure(load(out, self.device, self.dtype), OWN)
        self.add(self.label(name, share, documents), ROWS[name], measured, window=f"window{at}")

    def folder(self, name: str) -> Path:
        return self.session.folder / name.replace(" ", "-").replace(",", "")

    def attention(self, name: str) -> list[str]:
        """Words for the attention that a row trains: its own, dense, or a window."""
        if name.endswith(DENSE_CONTROL):
            return [f"sparsek.topk={self.given.length}", "scorer_training=frozen", "budgets=[]"]
        if name.endswith(WINDOW_CONTROL):
            window = f"sparsek.window={self.slots - SINKS}"
            return ["sparsek.topk=0", window, "scorer_training=frozen", "budgets=[]"]
        return []

    def add(
        self,
        name: str,
        words: tuple[str, ...],
        measured: dict[str, Any],
        *,
        window: str = "window",
        **more: Any,
    ) -> None:
        """A row; `window` names the one that "closed" refers to."""
        dense, window = self.named(DENSE), self.named(window)
        self.session.row(
            row=name,
            words=" ".join(words),
            closed=share_closed(measured, dense, window) if dense and window else None,
            **{key: measured[key] for key in ("ppl_last", "ppl", "loss_last", "loss")},
            **recall_text(measured["recall"]),
            recall=measured["recall"],
            loss_by_position=measured["loss_by_position"],
            **more,
        )

    def compare_alike(self) -> None:
        """Adds what is closed between dense attention and a window that were trained alike."""
        for row in self.session.record["rows"]:
            trained = row["row"].partition(_AGAIN)[0]
            dense, window = (self.named(f"{trained} {kind}") for kind in (DENSE, "window"))
            if dense and window:
                row["alike"] = share_closed(row, dense, window)


if __name__ == "__main__":
    main()
