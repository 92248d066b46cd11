"""What fewer slots cost: loss and recall of a converted base by budget, position, depth and length.

    python -m experiments.budgets OUT --held-out books/validation.jsonl.zst \\
        [--train books/train-00.jsonl.zst] [--model DIR] [--shares 64 32 16 8 4] [--seconds 240]

A base is converted (calibration only) at each share of `--length`, an eighth of the slots window,
and compared with a window and with random keys at equal slots, and once with dense attention:
perplexity of windows of unseen novels, by position too, and recall of 4 facts in documents of a
quarter, half and all of the length, by depth, in phrasings that calibration knows and in others.

OUT/results.json holds everything (the same command goes on where an earlier one stopped), and
`python -m experiments.plots FOLDER OUT` draws it. `--smoke`: toy sizes.
Time on one H100: about 15 s a share.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from experiments.steps import Steps
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
from sparsek_cli.benchmarks.session import Session, arguments
from sparsek_cli.devices import choose_device, choose_dtype
from sparsek_cli.evaluation.policies.registry import DENSE, OWN

NEEDLES = 4
SPLITS = ("calibration", "held_out")
POLICIES = ("window", "random", OWN)
COLUMNS = ("share", "slots", "policy", "ppl_last", "ppl", "closed", *SPLITS)
# What may differ between a run and its continuation.
FREE = ("shares", "seconds", "out")


def main() -> None:
    given = _arguments()
    session = Session.of(given, FREE)
    with weights_folder(session.folder) as weights:
        Experiment(session, given, weights).run()


def _arguments() -> argparse.Namespace:
    parser = arguments("experiments.budgets", __doc__, seconds=240)
    conversion_arguments(parser)
    parser.add_argument(
        "--shares", nargs="+", type=int, default=[16, 8, 32, 4, 64], metavar="N",
        help="slots are 1/N of the length",
    )  # fmt: skip
    given = parser.parse_args()
    if given.smoke:
        given.length, given.tokens, given.windows, given.questions = 1024, 4096, 2, 2
    return given


class Experiment:
    """Dense once, then one conversion per share under three policies."""

    def __init__(self, session: Session, given: argparse.Namespace, weights: Path):
        self.session, self.given = session, given
        self.device = choose_device(given.device)
        self.dtype = choose_dtype("auto", self.device)
        self.steps = Steps(session, [])
        self.weights, self.model = weights, weights / "model"

    def run(self) -> None:
        """All shares that are not there yet, then the table."""
        given = self.given
        self.base = with_tokenizer(given.model, self.weights / "base")
        lengths = (given.length // 4, given.length // 2, given.length)
        # Only the longest suite has windows.
        self.suites = {
            length: Suite.of(
                self.base, given.held_out, length=length, batch_tokens=65_536, splits=SPLITS,
                windows_=given.windows if length == given.length else 1,
                questions=given.questions, needles_=(NEEDLES,),
            )
            for length in lengths
        }  # fmt: skip
        self.session.run("dense", partial(self.share, None))
        for share in given.shares:
            self.session.run(f"1/{share}", partial(self.share, share), needs=20 * (not given.smoke))
        print(self.session.table(COLUMNS), flush=True)
        self.session.say(f"wrote {self.session.folder / 'results.json'}")

    def share(self, share: int | None) -> None:
        """One conversion; without a share what dense attention does."""
        length = self.given.length
        slots = length // (share or 16)
        words = conversion_words(
            slots,
            window=WINDOW_SHARE,
            sinks=SINKS,
            calibrate="none" if share is None else self.given.train or "auto",
            length=length,
            tokens=self.given.tokens,
            device=self.device.type,
        )
        self.steps.convert(self.base, self.model, words)
        model = load(self.model, self.device, self.dtype)
        measured: dict[str, dict[str, Any]] = {}
        for policy in (DENSE,) if share is None else POLICIES:
            row = measured[policy] = self.suites[length].measure(model, policy)
            depths = {
                str(n): suite.measure(model, policy)["by_depth"] if n != length else row["by_depth"]
                for n, suite in self.suites.items()
            }
            dense = self.dense()
            closed = share_closed(row, dense, measured["window"]) if share and dense else None
            self.session.row(
                share=share,
                slots=slots if share else length,
                policy=policy,
                **{key: row[key] for key in ("ppl_last", "ppl", "loss_last", "loss")},
                closed=closed,
                **recall_text(row["recall"]),
                recall=row["recall"],
                loss_by_position=row["loss_by_position"],
                by_depth=depths,
            )

    def dense(self) -> dict[str, Any] | None:
        return next((r for r in self.session.record["rows"] if r["policy"] == DENSE), None)


if __name__ == "__main__":
    main()
