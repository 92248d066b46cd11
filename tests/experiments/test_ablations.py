"""Every row of the ablations can be asked for; other scorers do what they say."""

import json
import sys

import pytest
import torch

from experiments import ablations
from experiments.steps import of_method
from experiments.variants.scorers import FutureFit, KeyValueFit, LeavingFit, in_place_of_linear
from sparsek_cli.console import Console
from sparsek_cli.conversion.calibrate.layerwise import LayerwiseBase
from sparsek_cli.conversion.calibrate.run import search
from sparsek_cli.conversion.calibrate.scorers.linear import LinearFit
from sparsek_cli.conversion.plan import plan as make_plan
from sparsek_cli.errors import UsageError
from sparsek_cli.recipes.load import load_recipe
from sparsek_cli.recipes.schema_convert import ConvertRecipe


def arguments(monkeypatch, out, *words):
    monkeypatch.setattr(sys, "argv", ["ablations", str(out), *words])
    return ablations._arguments()


@pytest.mark.parametrize("name", ablations.ROWS)
def test_every_row_is_a_request(name, monkeypatch, tmp_path):
    given = arguments(monkeypatch, tmp_path, "--held-out", "x", "--device", "cpu")
    words = ablations.Experiment(ablations.Session(tmp_path, 1, {}), given, tmp_path).request(name)
    words, _ = of_method(words)
    words = [f"{key}={json.dumps(value)}" for key, value in words.items()]
    recipe = load_recipe(ConvertRecipe, None, words, {"model": "tiny"})
    assert recipe.topk + recipe.window + recipe.sinks == 4096 // 16


@pytest.mark.slow
def test_a_run_goes_on_and_measures_dense_once(novels, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    words = ["--held-out", novels[1], "--smoke", "--device", "cpu", "--rows"]
    for rows in (["default"], ["default", "scorer-keys-values"]):
        arguments(monkeypatch, out, *words, *rows)
        ablations.main()
    record = json.loads((out / "results.json").read_text())
    assert [row["row"] for row in record["rows"]] == [
        "dense", "window", "random", "default", "scorer-keys-values",
    ]  # fmt: skip
    dense, window, _, default, other = record["rows"]
    gap = window["loss_last"] - dense["loss_last"]
    closed = 100 * (window["loss_last"] - default["loss_last"]) / gap
    assert default["closed"] == pytest.approx(closed)
    assert other["over_default"] == pytest.approx(other["closed"] - default["closed"])
    assert set(default["recall"]) == {"calibration", "held_out"}
    assert capsys.readouterr().out.count("--- default") == 1
    assert [file.name for file in out.iterdir()] == ["results.json"]
    arguments(monkeypatch, out, *words, "default", "--length", "256", "--share", "8")
    with pytest.raises(UsageError, match="holds results with share 16"):
        ablations.main()


@pytest.mark.parametrize(
    "fit",
    [
        LinearFit.of,
        FutureFit,
        *(pytest.param(n, marks=pytest.mark.slow) for n in (KeyValueFit, LeavingFit)),
    ],
)
def test_models_score_as_calibration_did(fit, dense_checkpoint, tmp_path, monkeypatch):
    """Whatever the scorer, and in batches."""
    from transformers import AutoModelForCausalLM

    from sparsek_cli.conversion.run import run as convert
    from sparsek_cli.models.attention import sparsek as attention

    base = dense_checkpoint("qwen3")
    recipe = ConvertRecipe(
        model=str(base), out=str(tmp_path / "out"), topk=24, window=16, device="cpu",
        calibrate_tokens=2048, calibrate_length=256,
    )  # fmt: skip
    plan = make_plan(recipe)
    found = search(plan, Console(quiet=True), fit)
    layers, choices = found.layers, found.choices
    neutral = {"calibrate": "none", "calibrate_tokens": None, "calibrate_length": None}
    convert(make_plan(recipe.model_copy(update=neutral)), Console(quiet=True))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.randint(3, 50, (2, 60))
    given, real = [], attention.sparsek_attention

    def watched(q, k, v, scores, **settings):
        given.append((scores, settings["topk"]))
        return real(q, k, v, scores, **settings)

    monkeypatch.setattr(attention, "sparsek_attention", watched)
    expected = []
    with torch.inference_mode():
        with in_place_of_linear(model, [layer.maps for layer in layers], choices):
            model(ids)
        model(ids)
        first = LayerwiseBase(plan, list(ids), [(0, 0)] * 2, torch.device("cpu"), torch.float32)
        maps, chosen = layers[0].maps, choices[0]

        def score(number, recorded):
            each = {name: maps[name].of(recorded) for name in maps}
            expected.append(torch.stack([each[n][g] for g, n in enumerate(chosen.maps)]))

        first.run_layer(0, range(2), score, advance=False)
    scores, topk = given[0]
    assert torch.allclose(scores, torch.stack(expected), atol=1e-4)
    assert topk == chosen.topk and float(scores.std()) > 0.1
    # Afterwards the model is as it was: neutral scores.
    after, topk = given[len(layers)]
    assert not after.any() and topk == 24
