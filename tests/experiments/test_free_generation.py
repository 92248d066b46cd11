"""Free answers: what their figures mean, and a toy run from end to end."""

import json
import sys

import pytest

from experiments import free_generation
from sparsek_cli.conversion.plan import plan
from sparsek_cli.conversion.run import run
from sparsek_cli.recipes.schema_convert import ConvertRecipe
from sparsek_cli.reporter import Silent


def test_figures_by_hand():
    dense = [[1, 2, 3, 4], [5, 6]]
    answers = [[1, 2, 9, 9, 9, 9, 9, 9], [5, 6]]
    found = free_generation.measured(answers, dense, most=8)
    assert found["tokens"] == 5 and found["over_dense"] == pytest.approx(10 / 6)
    assert found["ended"] == 50  # the first was stopped
    assert found["like_dense"] == pytest.approx(100 * (2 / 8 + 1) / 2)
    # Of the first one's five runs of four tokens the last two are repeated.
    assert found["repeated"] == pytest.approx(100 * (2 / 5 + 0) / 2)
    same = free_generation.measured(dense, dense, most=8)
    assert same["over_dense"] == 1 and same["like_dense"] == 100


def test_a_toy_run_and_its_continuation(novels, tmp_path, monkeypatch, capsys):
    made = tmp_path / "sparse"
    settings = {"topk": 16, "window": 12, "sinks": 4, "calibrate": "none", "device": "cpu"}
    run(plan(ConvertRecipe(model="tiny", out=str(made), **settings)), Silent())
    words = [str(tmp_path / "out"), "--model", str(made), "--held-out", novels[1], "--smoke"]
    for policies in (["sparsek"], ["sparsek", "window"]):
        given = ["free_generation", *words, "--device", "cpu", "--policies", *policies]
        monkeypatch.setattr(sys, "argv", given)
        free_generation.main()
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [row["policy"] for row in rows] == ["dense", "sparsek", "window"]
    assert all(len(row["answers"]) == 2 and 0 < row["tokens"] <= 8 for row in rows)
    assert rows[0]["like_dense"] == 100 and rows[0]["ids"] != rows[2]["ids"]
    assert "over_dense" in capsys.readouterr().out
