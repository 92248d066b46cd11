"""The conversion experiment from training a base to the last row, at toy sizes."""

import json
import sys

import pytest

from experiments import conversion


@pytest.mark.slow
def test_a_toy_run_fills_every_row(novels, tmp_path, monkeypatch, capsys):
    train, held_out = novels
    out, kept = tmp_path / "out", tmp_path / "kept"
    words = [str(out), "--train", train, "--held-out", held_out, "--smoke", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["conversion", *words, "--keep-base", str(kept)])
    conversion.main()
    record = json.loads((out / "results.json").read_text())
    assert not [name for name, phase in record["phases"].items() if "seconds" not in phase]
    assert not [name for name, phase in record["phases"].items() if "error" in phase]
    rows = {(row["model"], row["slots"], row["policy"]): row for row in record["rows"]}
    for slots in (32, 64):
        for policy in ("window", "random", "sparsek"):
            assert rows["calibrated", slots, policy]["ppl"] > 1
        assert rows["calibrated", slots, "window"]["closed"] == 0
        assert rows["scorers", slots, "sparsek"]["recall"].keys() == {
            "calibration", "held_out", "unseen",
        }  # fmt: skip
        assert ("all", slots, "sparsek") in rows
    assert ("all, as window", 32, "sparsek") in rows
    assert (kept / "model.safetensors").is_file()
    assert "$ sparsek convert" in capsys.readouterr().out

    again = [str(tmp_path / "again"), *words[1:], "--base", str(kept), "--base-steps", "30"]
    again += ["--shares", "8", "--recipes", "small-3-all", "--set", "steps=3"]
    monkeypatch.setattr(sys, "argv", ["conversion", *again])
    conversion.main()
    rows = json.loads((tmp_path / "again" / "results.json").read_text())["rows"]
    assert {row["slots"] for row in rows} == {64, 512}
    assert [row["model"] for row in rows if row["policy"] == "dense"] == ["calibrated", "all"]
    assert "3 steps, loss" in capsys.readouterr().out
