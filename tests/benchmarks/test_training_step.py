"""Sparse and dense steps of the same weights are timed."""

import json
import sys

from sparsek_cli.benchmarks import training_step


def test_a_toy_run_times_both(tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["training_step", str(tmp_path / "out"), "--smoke", "--device", "cpu"]
    )
    training_step.main()
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert all("error" not in phase for phase in record["phases"].values())
    dense, sparse = record["rows"]
    assert (dense["attention"], sparse["attention"]) == ("sdpa", "sparsek")
    assert len(sparse["each"]) == 3 and min(sparse["each"]) > 0
    assert sparse["times_best_dense"] == dense["seconds"] / sparse["seconds"]
