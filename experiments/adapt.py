"""Whether training closes the gap: ceilings, `adapt` and its controls, and the bars, in one table.

    python -m experiments.adapt OUT --model BASE \\
        --train books/train-00.jsonl.zst --tune books/train-01.jsonl.zst books/train-02.jsonl.zst \\
        --held-out books/validation.jsonl.zst [--steps 300] [--seeds 1] [--seconds 1700]

In this order, each in the time that is left: what selection alone can reach at a sixteenth and an
eighth (experiments.ablations: default, future and ceiling); `adapt` at a sixteenth, calibrated once
more at both shares, and dense attention and a window trained alike (experiments.tuning); then the
other objectives and ways of training scorers, of `--others`; then more seeds of `adapt`. BASE may
be a public model: where it does not know the phrasings its recall says nothing, its loss does.

`--set` gives words to every training, like micro_batch_size=4. Each part has a folder in OUT, and
the same command goes on where an earlier one stopped; OUT/table.json holds the rows and the bars.
`--smoke`: toy sizes. Time on one H100, for a base of 26M parameters: a minute for the ceilings, and
about a minute for 100 steps of a row.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from experiments.suite import share_closed
from experiments.tuning import ROWS
from sparsek_cli.benchmarks.session import RESULTS, Session, arguments

SHARES = (16, 8)
MAIN = "adapt"
CONTROLS = ("adapt dense", "adapt window")
OTHERS = tuple(name for name in ROWS if name.startswith(f"{MAIN}, "))
COLUMNS = ("part", "row", "closed", "alike", "ppl_last", "ppl", "calibration", "held_out")
# In percent: shares of the loss that are to be closed, and of dense's recall that is to be kept.
CLOSED = {16: 85.0, 8: 93.0}
RECALL = 98.0
# A dense self that loses so much more, in nats, has suffered.
SUFFERED = 0.01


def main() -> None:
    given = _arguments()
    session = Session(Path(given.out), given.seconds, {"settings": vars(given)})
    Experiment(session, given).run()


def _arguments() -> argparse.Namespace:
    parser = arguments("experiments.adapt", __doc__, seconds=1700)
    parser.add_argument("--model", default="tiny", help="base to convert: a folder, or tiny")
    parser.add_argument("--train", required=True, help="text to calibrate on")
    parser.add_argument("--tune", nargs="+", required=True, help="text to train on")
    parser.add_argument("--held-out", required=True, help="text that is only measured")
    parser.add_argument("--length", type=int, default=4096, help="tokens of windows and documents")
    parser.add_argument("--steps", type=int, default=300, help="of training")
    parser.add_argument("--questions", type=int, default=96, help="of each kind and number")
    parser.add_argument("--others", nargs="*", choices=OTHERS, default=[], metavar="NAME")
    parser.add_argument("--seeds", type=int, default=1, help="runs of `adapt`")
    parser.add_argument("--set", nargs="+", default=[], metavar="WORD", help="for every training")
    return parser.parse_args()


class Experiment:
    """Parts that are programs of their own, and the table of what they found."""

    def __init__(self, session: Session, given: argparse.Namespace):
        self.session, self.given, self.out = session, given, session.folder

    def run(self) -> None:
        """All parts that time is left for, then the table and the bars."""
        for share in SHARES:
            rows = ["--rows", "default", "ceiling", "future"]
            self.part(f"ceiling-{share}", "ablations", "--train", self.given.train,
                      "--share", share, *rows)  # fmt: skip
        again = ["--again", MAIN, "--also", SHARES[1]]
        self.train("seed-0", "--rows", MAIN, *CONTROLS, *again)
        if self.given.others:
            self.train("seed-0", "--rows", MAIN, *CONTROLS, *self.given.others, *again)
        for seed in range(1, self.given.seeds):
            self.train(f"seed-{seed}", "--rows", MAIN, *again, seed=seed)
        rows, bars = self.rows(), self.bars()
        file = self.out / "table.json"
        file.write_text(json.dumps({"rows": rows, "bars": bars}, indent=1) + "\n")
        print(self.session.table(COLUMNS, rows))
        print(self.session.table(("bar", "wanted", "found", "reached"), bars), flush=True)
        self.session.say(f"wrote {file}")

    def part(self, name: str, module: str, *words: Any) -> None:
        """One program, in the time that is left."""
        given = self.given
        if self.session.left < 10:
            self.session.say(f"{name}: no time left")
            return
        command = [
            sys.executable, "-m", f"experiments.{module}", self.out / name,
            "--model", given.model, "--held-out", given.held_out, "--length", given.length,
            "--questions", given.questions, "--device", given.device,
            "--seconds", int(self.session.left), *(["--smoke"] if given.smoke else []), *words,
        ]  # fmt: skip
        self.session.say(f"--- {name}")
        ended = subprocess.run([str(word) for word in command]).returncode
        if ended:
            self.session.say(f"{name}: ended with {ended}")

    def train(self, name: str, *words: Any, seed: int = 0) -> None:
        """Rows of experiments.tuning at the first share."""
        given = self.given
        self.part(
            name, "tuning", "--train", given.train, "--tune", *given.tune, "--steps", given.steps,
            "--share", SHARES[0], *words, "--set", f"seed={seed}", *given.set,
        )  # fmt: skip

    def found(self, part: str) -> dict[str, dict[str, Any]]:
        """Rows of one part by name."""
        file = self.out / part / RESULTS
        if not file.is_file():
            return {}
        return {row["row"]: row for row in json.loads(file.read_text())["rows"]}

    def parts(self) -> list[str]:
        return [f"ceiling-{share}" for share in SHARES] + [
            f"seed-{seed}" for seed in range(self.given.seeds)
        ]

    def rows(self) -> list[dict[str, Any]]:
        """Every row of every part."""
        return [{"part": part} | row for part in self.parts() for row in self.found(part).values()]

    def bars(self) -> list[dict[str, Any]]:
        """What was wanted beside what was found, as far as it was."""
        made = []
        for part in self.parts():
            rows = self.found(part)
            dense = rows.get("dense")
            if part.startswith("ceiling"):
                share = int(part.split("-")[1])
                self.compare(made, f"ceiling at 1/{share}", 95.0, rows.get("ceiling"), "closed")
                continue
            ends = {16: f"{MAIN}, again", 8: f"{MAIN}, again at 1/8"}
            for share, name in ends.items():
                self.compare(made, f"{part}: closed at 1/{share}", CLOSED[share],
                             rows.get(name), "closed")  # fmt: skip
            end = rows.get(ends[16])
            trained = [rows.get(name) for name in CONTROLS]
            if end and all(trained):
                alike = {"alike": share_closed(end, *trained)}
                name = f"{part}: closed between controls trained alike"
                self.compare(made, name, CLOSED[16], alike, "alike")
            if end and dense and dense["recall"]:
                worst = {"kept": kept_recall(end["recall"], dense["recall"])}
                self.compare(made, f"{part}: worst recall, % of dense", RECALL, worst, "kept")
            itself = rows.get(f"{MAIN}, dense self")
            if itself and dense:
                gained = {"gain": dense["loss_last"] - itself["loss_last"]}
                name = f"{part}: loss that the dense self gained, nats"
                self.compare(made, name, -SUFFERED, gained, "gain")
        return made

    def compare(
        self, bars: list, name: str, wanted: float, row: dict[str, Any] | None, key: str
    ) -> None:
        """Adds a bar: `row[key]` is to be at least `wanted`."""
        found = None if row is None else row.get(key)
        reached = "not measured" if found is None else "yes" if found >= wanted else "no"
        bars.append({"bar": name, "wanted": wanted, "found": found, "reached": reached})


def kept_recall(
    recall: dict[str, dict[str, float]], dense: dict[str, dict[str, float]]
) -> float | None:
    """The smallest recall of any kind in percent of dense's; None where dense recalls nothing."""
    shares = [
        100 * recall[split][needles] / there
        for split, by_needles in dense.items()
        for needles, there in by_needles.items()
        if there
    ]
    return min(shares, default=None)


if __name__ == "__main__":
    main()
