"""What trains a conversion back: every row is a recipe, controls are compared with their own."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from experiments import tuning
from experiments.steps import Steps, of_variants
from sparsek_cli.recipes.load import load_recipe
from sparsek_cli.recipes.schema_finetune import FinetuneRecipe


@pytest.mark.parametrize("name", tuning.ROWS)
def test_every_row_is_a_recipe_and_every_control_has_a_row(name):
    words, _ = of_variants(tuning.ROWS[name])
    words.append("data.novels.files=x")
    assert load_recipe(FinetuneRecipe, "small-3-all", words, verb="finetune").train == "all"
    for kind in (" dense", " window"):
        if name.endswith(kind):
            assert tuning.ROWS[name.removesuffix(kind)] == tuning.ROWS[name]


def test_a_row_is_compared_with_controls_of_its_words():
    losses = {"a": 3.1, "a dense": 3.0, "a window": 3.5, "b": 3.2, "a, again, retold": 3.05}
    experiment = tuning.Experiment.__new__(tuning.Experiment)
    rows = [{"row": name, "loss_last": loss} for name, loss in losses.items()]
    experiment.session = SimpleNamespace(record={"rows": rows})
    experiment.compare_alike()
    assert [row.get("alike") for row in rows] == [
        pytest.approx(80.0), None, None, None, pytest.approx(90.0)
    ]  # fmt: skip


def test_a_window_is_trained_without_stand_ins(two_layers, tmp_path):
    """It had those of the conversion, which the windows that it is compared with have not."""
    experiment = tuning.Experiment.__new__(tuning.Experiment)
    experiment.session = SimpleNamespace(folder=tmp_path, say=print)
    experiment.given = SimpleNamespace(
        train="x", length=512, share=16, tokens=4096, convert=["cache_dtype=int8"]
    )
    experiment.base, experiment.sparse = Path(two_layers), tmp_path / "sparse"
    experiment.device, experiment.steps = torch.device("cpu"), Steps(experiment.session, [])
    assert experiment.start_of("adapt") == experiment.start_of("adapt dense") == tmp_path / "sparse"
    block = json.loads((experiment.start_of("adapt window") / "config.json").read_text())["sparsek"]
    assert "stand_ins" not in block["scorer"] and block["cache_dtype"] == "int8"


@pytest.mark.slow
def test_a_control_keeps_every_key_and_a_row_is_calibrated_again(novels, tmp_path, monkeypatch):
    train, held_out = novels
    words = ["tuning", str(tmp_path / "out"), "--model", "tiny", "--train", train, "--tune", train,
             "--held-out", held_out, "--device", "cpu", "--smoke"]  # fmt: skip
    rows = ["--rows", "text 3e-4 dense", "text 1e-4", "--documents", "told_and_asked"]
    monkeypatch.setattr(sys, "argv", [*words, *rows])
    tuning.main()
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    dense, window, own, control, trained, itself, again, told = record["rows"]
    assert told["row"] == "text 1e-4, again, told_and_asked"
    assert itself["row"] == "text 1e-4, dense self"
    assert itself["loss"] == pytest.approx(trained["loss"], abs=0.05)  # stand-ins learned the text
    assert [row["row"] for row in record["rows"][:3]] == ["dense", "window", "sparsek"]
    closed = (window["loss_last"] - own["loss_last"]) / (window["loss_last"] - dense["loss_last"])
    assert own["closed"] == pytest.approx(100 * closed)
    assert (trained["row"], again["row"]) == ("text 1e-4", "text 1e-4, again")
    assert all("error" not in phase for phase in record["phases"].values())
    # Two steps move it a little; a window stays far away.
    assert abs(control["loss_last"] - dense["loss_last"]) < 0.05
    assert window["loss_last"] - dense["loss_last"] > 0.1
