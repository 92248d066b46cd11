"""Scorers with a hidden layer: fitted by calibration, written, loaded, and trained on."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import sparsek_cli.models as models
from sparsek_cli.console import Console
from sparsek_cli.conversion.calibrate.chosen_scorers import scorers_of
from sparsek_cli.conversion.calibrate.method import Method
from sparsek_cli.conversion.calibrate.recorded import Recorded
from sparsek_cli.conversion.calibrate.run import search
from sparsek_cli.conversion.calibrate.scorers.linear import LinearFit, Targets
from sparsek_cli.conversion.calibrate.scorers.mlp import MlpFit
from sparsek_cli.conversion.plan import plan as make_plan
from sparsek_cli.conversion.run import run as convert
from sparsek_cli.models.logits import Logits
from sparsek_cli.models.scorer import SparseKMlpScorer, SparseKScorer
from sparsek_cli.recipes.schema_convert import ConvertRecipe

SLOW_FAMILIES = ("llama", "mistral", "qwen2", "gpt_neox")
QUIET = Console(quiet=True)
EMPTY = torch.empty(0)


def request(base, out, method=None, **settings):
    settings = {"topk": 24, "window": 16, "device": "cpu", "calibrate_tokens": 2048,
                "calibrate_length": 256} | settings  # fmt: skip
    return make_plan(ConvertRecipe(model=str(base), out=str(out), **settings), method)


def mlp_scorer(hidden_size=8, heads=2, width=5):
    scorer = SparseKMlpScorer(hidden_size, heads, width)
    for parameter in scorer.parameters():
        torch.nn.init.normal_(parameter)
    return scorer


def test_scores_are_the_formula_in_float64():
    scorer, x = mlp_scorer(), torch.randn(2, 7, 8)
    w = {name: parameter.detach().double() for name, parameter in scorer.named_parameters()}
    hidden = x.double() @ w["hidden_weight"].T + w["hidden_bias"]
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    expected = x.double() @ w["weight"].T + w["bias"] + hidden @ w["out_weight"].T
    scores = scorer(x)[0].double()
    torch.testing.assert_close(scores, expected.transpose(1, 2), atol=1e-5, rtol=1e-5)
    assert scorer.bfloat16().hidden_weight.dtype == torch.float32


def test_an_untrained_one_is_linear_and_every_part_learns():
    scorer, x = mlp_scorer(), torch.randn(1, 7, 8)
    torch.nn.init.zeros_(scorer.out_weight)
    linear = SparseKScorer(8, 2)
    linear.load_state_dict({name: scorer.state_dict()[name] for name in linear.state_dict()})
    assert torch.equal(scorer(x)[0], linear(x)[0])
    torch.nn.init.normal_(scorer.out_weight)
    scorer(x)[0].square().sum().backward()
    learned = {name for name, p in scorer.named_parameters() if p.grad is not None}
    assert learned == {"weight", "bias", "hidden_weight", "hidden_bias", "out_weight"}


def test_an_mlp_learns_what_a_line_cannot(dense_checkpoint, tmp_path, all_steps):
    base = dense_checkpoint("llama")
    plan = request(base, tmp_path / "out")
    torch.manual_seed(0)
    inputs = torch.randn(4000, plan.geometry.hidden)
    targets = torch.stack([inputs[:, 0].abs() * 3 - 5, inputs[:, 1] - 5])
    recorded = Recorded(inputs, EMPTY, EMPTY, EMPTY, Logits(1.0))
    quality = {}
    for name, fit in (("mlp", MlpFit), ("linear", LinearFit.of)):
        made = fit(plan, torch.device("cpu"))
        with torch.inference_mode():
            made.add(recorded, Targets(torch.arange(2000), targets[:, :2000], None))
            later = targets[:, 2000:]
            made.add(recorded, Targets(torch.arange(2000, 4000), later, later))
            scores = made.maps()["all"].of(recorded)
        assert torch.allclose(scores.mean(1), torch.zeros(2), atol=1e-2)
        assert torch.allclose(scores.std(1), torch.full((2,), 2.0), atol=1e-2)
        quality[name] = [float(torch.corrcoef(torch.stack(p))[0, 1])
                         for p in zip(scores, targets, strict=True)]  # fmt: skip
    assert quality["linear"][0] < 0.2 and quality["mlp"][0] > 0.5
    assert quality["linear"][1] > 0.98 and quality["mlp"][1] > 0.95


# One mechanism: two families that store their weights differently stand for all.
@pytest.mark.parametrize(
    "family",
    ["gpt2", "qwen3", *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW_FAMILIES)],
)
def test_the_written_scorer_scores_as_calibration_did(family, dense_checkpoint, tmp_path):
    plan = request(dense_checkpoint(family), tmp_path / "out")
    found = search(plan, QUIET, MlpFit)
    x = torch.randn(50, plan.geometry.hidden)
    for layer, choice, made in zip(
        found.layers, found.choices, scorers_of(found.layers, found.choices), strict=True
    ):
        scorer = SparseKMlpScorer(plan.geometry.hidden, plan.geometry.kv_heads, 128)
        scorer.load_state_dict({k: torch.from_numpy(v) for k, v in made.tensors().items()})
        each = {name: layer.maps[name].of(Recorded(x, EMPTY, EMPTY, EMPTY, Logits(1.0)))
                for name in choice.maps}  # fmt: skip
        expected = torch.stack([each[name][head] for head, name in enumerate(choice.maps)])
        torch.testing.assert_close(scorer(x[None])[0][0], expected, atol=1e-3, rtol=1e-3)
        assert float(made.out_weight.std()) > 0


@torch.no_grad()
def test_a_converted_model_loads_decodes_and_is_calibrated_again(
    dense_checkpoint, tokenizer, tmp_path
):
    base = dense_checkpoint("llama")
    convert(request(base, tmp_path / "out"), QUIET)
    block = json.loads((tmp_path / "out" / "config.json").read_text())["sparsek"]
    assert block["scorer"] | {"stand_ins": 1} == {"type": "mlp", "width": 128, "stand_ins": 1}
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = torch.randint(3, 50, (2, 60))
    whole = model(ids, use_cache=False).logits
    cache = models.SparseKCache(model.config)
    parts = [model(part, past_key_values=cache).logits for part in ids.split([30, 1, 28, 1], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=2e-4, rtol=2e-4)
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again = request(tmp_path / "saved", tmp_path / "again", again=True)
    assert again.calibration.method.scorer == "mlp"
    convert(again, QUIET)
    first, second = (load_file(tmp_path / n / "sparsek.safetensors") for n in ("out", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_without_calibration_the_hidden_layer_waits_for_training(dense_checkpoint, tmp_path):
    method = Method(width=16)
    convert(request(dense_checkpoint("gpt2"), tmp_path / "out", calibrate="none", method=method,
                    calibrate_tokens=None, calibrate_length=None), QUIET)  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for attention in models.sparsek_attentions(model):
        scorer = attention.scorer
        assert scorer.hidden_weight.shape == (16, 32) and scorer.hidden_weight.std() > 0.1
        assert not scorer.out_weight.any() and not scorer.weight.any()


def test_a_model_from_scratch_may_have_one(dense_config):
    block = {"scorer": {"type": "mlp", "width": 8}}
    config = models.sparsek_config_from(dense_config("llama"), block)
    scorer = models.sparsek_attentions(AutoModelForCausalLM.from_config(config))[0].scorer
    assert isinstance(scorer, SparseKMlpScorer) and scorer.hidden_weight.shape[0] == 8


@pytest.mark.parametrize(
    "fields",
    [
        {"maps": ("blend",)},
        {"scorer": "tree"},
        {"target": "least"},
        {"documents": "x"},
        {"maps": ()},
    ],
)
def test_methods_that_cannot_be_are_refused(fields):
    with pytest.raises(ValueError):
        Method(**fields)
