"""The bars say what was found, and that something was not measured."""

import json
import sys

import pytest

from experiments import adapt
from sparsek_cli.benchmarks.session import RESULTS, Session

RECALL = {"calibration": {"1": 100.0, "4": 90.0}, "held_out": {"1": 80.0, "4": 0.0}}


def experiment(monkeypatch, out, *words):
    given = ["adapt", str(out), "--train", "a", "--tune", "b", "--held-out", "c", *words]
    monkeypatch.setattr(sys, "argv", given)
    return adapt.Experiment(Session(out, 60, {}), adapt._arguments())


def test_bars_compare_with_dense_and_with_controls(tmp_path, monkeypatch):
    losses = {"dense": 3.0, "window": 3.5, "adapt": 3.1, "adapt, dense self": 3.02,
              "adapt, again": 3.05, "adapt dense": 2.9, "adapt window": 3.4}  # fmt: skip
    rows = [
        {"row": name, "loss_last": loss, "recall": RECALL, "closed": 100 * (3.5 - loss) / 0.5}
        for name, loss in losses.items()
    ]
    rows[4] |= {"recall": {"calibration": {"1": 99.0, "4": 90.0},
                           "held_out": {"1": 76.0, "4": 0.0}}}  # fmt: skip
    (tmp_path / "seed-0").mkdir()
    (tmp_path / "seed-0" / RESULTS).write_text(json.dumps({"rows": rows}))
    made = {bar["bar"]: bar for bar in experiment(monkeypatch, tmp_path).bars()}
    assert made["ceiling at 1/16"]["reached"] == "not measured"
    assert made["seed-0: closed at 1/16"]["found"] == pytest.approx(90)
    assert made["seed-0: closed at 1/16"]["reached"] == "yes"
    assert made["seed-0: closed at 1/8"]["reached"] == "not measured"
    alike = made["seed-0: closed between controls trained alike"]
    assert (alike["found"], alike["reached"]) == (pytest.approx(70), "no")
    assert made["seed-0: worst recall, % of dense"]["found"] == pytest.approx(95)
    assert made["seed-0: loss that the dense self gained, nats"]["reached"] == "no"


@pytest.mark.slow
def test_a_toy_run_fills_the_table(novels, two_layers, tmp_path, monkeypatch):
    train, held_out = novels
    words = ["--model", two_layers, "--device", "cpu", "--smoke", "--seconds", "3000"]
    given = ["adapt", str(tmp_path / "out"), "--train", train, "--tune", train, "--held-out",
             held_out, *words]  # fmt: skip
    monkeypatch.setattr(sys, "argv", given)
    adapt.main()
    found = json.loads((tmp_path / "out" / "table.json").read_text())
    names = {(row["part"], row["row"]) for row in found["rows"]}
    assert {("ceiling-16", "ceiling"), ("ceiling-8", "ceiling"), ("seed-0", "adapt window"),
            ("seed-0", "adapt, again"), ("seed-0", "adapt, again at 1/8"),
            ("seed-0", "adapt, dense self")} <= names  # fmt: skip
    reached = {bar["bar"]: bar["reached"] for bar in found["bars"]}
    assert (
        reached.pop("seed-0: worst recall, % of dense") == "not measured"
    )  # dense recalls nothing
    assert len(reached) > 5 and {*reached.values()} <= {"yes", "no"}
