"""All policies trained from random weights at toy sizes, measured at three lengths."""

import json
import sys

import pytest

from experiments import scratch
from experiments.suite import BINS


@pytest.mark.slow
def test_a_toy_run_fills_every_row(novels, tmp_path, monkeypatch):
    train, held_out = novels
    words = [str(tmp_path / "out"), "--train", train, "--held-out", held_out, "--smoke"]
    words += ["--device", "cpu", "--set", "sparsek.gate=log"]
    monkeypatch.setattr(sys, "argv", ["scratch", *words])
    scratch.main()
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert all("error" not in phase for phase in record["phases"].values())
    rows = {row["model"]: row for row in record["rows"]}
    assert set(rows) == set(scratch.VARIANTS)
    assert {row["keys"] for name, row in rows.items() if name != "dense"} == {512}
    assert len({row["tokens"] for row in rows.values()}) == 1
    for row in rows.values():
        assert row["ppl_256"] > 1 and row["ppl_512"] > 1 and row["ppl_1024"] > 1
        assert len(row["loss_by_position"]["1024"]) == BINS
    assert rows["dense"]["over_dense"] == 0
