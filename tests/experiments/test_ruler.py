"""A base is taught RULER's wording at toy sizes, converted and measured by evaluate."""

import json
import sys

import pytest

from experiments import ruler
from sparsek_cli.hub import bundled


def test_samples_end_with_their_answers(novels):
    made = ruler.samples(bundled().path, novels[0], 16, processes=1)
    assert len(made) == 16 == len(set(made))
    asked = [text.rpartition("mentioned in the provided text")[2] for text in made]
    assert all(" is " in answer or " are " in answer for answer in asked)
    for text, answer in zip(made, asked, strict=True):
        for value in answer.rstrip(".").split(" is ")[-1].split(" are ")[-1].split(", "):
            assert f"is: {value}." in text.rpartition("What ")[0]  # told before it is asked


@pytest.mark.slow
def test_a_toy_run_measures_every_policy(novels, tmp_path, monkeypatch):
    train, held_out = novels
    words = [str(tmp_path / "out"), "--train", train, "--held-out", held_out, "--smoke"]
    monkeypatch.setattr(sys, "argv", ["ruler", *words, "--device", "cpu"])
    ruler.main()
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert all("error" not in phase for phase in record["phases"].values())
    rows = {row["policy"]: row for row in record["rows"]}
    assert set(rows) == {"dense", "sparsek", "window"}
    assert all(row["length"] == 1024 and row["tasks"] == 1 for row in rows.values())
    assert (tmp_path / "out" / "eval" / "report.html").is_file()
