"""Calibrated models: every family and method, what the report says, and what it is good for."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from verbs import convert

from sparsek_cli.conversion.calibrate.method import Method
from sparsek_cli.conversion.calibrate.sequences.build import calibration_sequences
from sparsek_cli.recipes.schema_convert import ConvertRecipe

STORIES = Path(
    os.environ.get(
        "SPARSEK_TEST_STORIES",
        Path(__file__).parents[3] / "shared" / "models" / "stories260k-hf",
    )
)


SLOW_FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "gpt_neox")


def calibrated(base: Path, out: Path, method: Method | None = None, **settings):
    recipe = ConvertRecipe(model=str(base), out=str(out), device="cpu", **settings)
    return convert(recipe, method=method)


@pytest.mark.parametrize(
    "family",
    ["qwen3", *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW_FAMILIES)],
)
def test_every_family_calibrates(family, dense_checkpoint, tmp_path):
    from safetensors.numpy import load_file

    base = dense_checkpoint(family)
    options = {"topk": 24, "window": 16, "calibrate_tokens": 2048, "calibrate_length": 256}
    done = [calibrated(base, tmp_path / name, **options) for name in ("a", "b")]
    reports = [each.calibration for each in done]
    one, two = (load_file(tmp_path / name / "sparsek.safetensors") for name in ("a", "b"))
    assert one.keys() == two.keys() and all(np.array_equal(one[k], two[k]) for k in one)
    assert reports[0]["text_loss"] == reports[1]["text_loss"] > 0
    assert reports[0]["not_refined"] is None
    assert all(np.isfinite(array).all() for array in one.values())
    weights = [array for name, array in one.items() if name.endswith("weight")]
    assert all(array.any() for array in weights)
    for worse, words in (
        ({"text": 1}, "in text;"),
        ({"answer": 1}, "at answers far back;"),
        ({}, ""),
    ):
        losses = {f"{kind}_loss": worse.get(kind, 0) for kind in ("text", "answer")}
        windows = {f"window_{kind}": 0.5 for kind in losses}
        said = replace(done[0], calibration={**reports[0], **losses, **windows}).text()
        assert ("warning: a plain window loses less" in said) == bool(worse) and words in said


@pytest.mark.parametrize(
    "method",
    [
        {"target": "mean", "maps": ("all",), "slopes": (0.3,), "sizes": (0.5,)},
        {"target": "p99", "documents": "statements"},
        {"documents": "none"},
    ],
)
def test_methods_that_can_be_chosen(dense_checkpoint, tmp_path, method):
    options = {"topk": 24, "window": 16, "calibrate_tokens": 2048, "calibrate_length": 256}
    options |= {"recall": 0.5, "method": Method(**method)}
    report = calibrated(dense_checkpoint("llama"), tmp_path / "a", **options)
    layers = report.calibration["layers"]
    chosen = {name for layer in layers for name in layer["map"]}
    assert chosen <= set(method.get("maps", ["text"] if method == {"documents": "none"} else
                                    ["text", "all", "answers", "blend"]))  # fmt: skip
    if "slopes" in method:
        assert {slope for layer in layers for slope in layer["slope"]} <= {0.3, 30.0}
    assert sum(size for layer in layers for size in layer["topk"]) <= 24 * sum(
        len(layer["topk"]) for layer in layers
    )


@pytest.mark.parametrize(
    "family",
    ["gpt2", "gemma3n_text-shared", pytest.param("gemma4_text-shared", marks=pytest.mark.slow)],
)
def test_the_report_says_what_the_converted_model_loses(family, dense_checkpoint, tmp_path):
    """Its text and answer losses are those of the model on disk, on the same documents."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sparsek_cli.evaluation.policies.head_budgets import as_window
    from sparsek_cli.models import dense_attention

    base, slots = dense_checkpoint(family), {"topk": 24, "window": 16}
    report = calibrated(
        base, tmp_path / "out", **slots, calibrate_tokens=2048, calibrate_length=512,
        method=Method(documents="statements"),
    ).calibration  # fmt: skip
    _, documents = calibration_sequences(
        AutoTokenizer.from_pretrained(base), "auto", fitting=8, fit_length=512, held_out=4,
        lengths=(512,), documents="statements", seed=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    documents = documents[:3]  # along the gradient of the fourth slots are moved
    ids = torch.from_numpy(np.stack([document.ids for document in documents]))
    answer = torch.from_numpy(np.stack([document.answer for document in documents]))
    asking = torch.from_numpy(np.stack([document.asking for document in documents]))
    text = ~(answer | asking) & (torch.arange(512) >= 44)
    with torch.inference_mode():
        with dense_attention(model):
            dense = model(ids, use_cache=False).logits.log_softmax(-1)

        def losses() -> list[float]:
            sparse = model(ids, use_cache=False).logits.log_softmax(-1)
            divergence = (dense.exp() * (dense - sparse)).sum(-1)
            # The mean of documents' means: they count alike.
            means = [(divergence * rows).sum(1) / rows.sum(1) for rows in (text, answer)]
            return [float(mean.mean()) for mean in means]

        own = [report["text_loss"], report["answer_loss"]]
        assert losses() == pytest.approx(own, rel=1e-3, abs=1e-8)
        with as_window(model):
            window = [report["window_text_loss"], report["window_answer_loss"]]
            assert losses() == pytest.approx(window, rel=1e-3, abs=1e-8)


@pytest.mark.parametrize(
    ("parts", "together"), [(1, True), pytest.param(12, False, marks=pytest.mark.slow)]
)
def test_neighbouring_layers_of_a_deep_model_are_valued_together(
    dense_checkpoint, tmp_path, monkeypatch, parts, together
):
    from dataclasses import replace

    from sparsek_cli.conversion.calibrate import effort

    options = {"topk": 8, "window": 8, "calibrate_tokens": 2048, "calibrate_length": 256}
    monkeypatch.setattr(effort, "CPU", replace(effort.CPU, parts=parts))
    report = calibrated(dense_checkpoint("qwen2"), tmp_path / "out", **options).calibration
    worths = [layer["worth"] for layer in report["layers"]]
    assert len(worths) > 1 and all(min(worth) > 0 for worth in worths)
    assert (worths[0] == worths[-1]) == together


@pytest.mark.slow
@pytest.mark.skipif(not STORIES.is_dir(), reason="the stories260k checkpoint is not here")
def test_calibrated_scores_beat_random_and_window(tmp_path, all_steps):
    from transformers import AutoModelForCausalLM

    from sparsek_cli.models import budget, dense_attention, random_scores

    out = tmp_path / "out"
    calibrated(STORIES, out, topk=28, window=16, calibrate_tokens=16384)
    model = AutoModelForCausalLM.from_pretrained(out)
    with torch.inference_mode():
        with dense_attention(model):
            start = torch.full((4, 1), 1)
            stories = model.generate(start, max_new_tokens=400, do_sample=True, pad_token_id=2)
            dense = model(stories, use_cache=False).logits.log_softmax(-1)

        def divergence() -> float:
            sparse = model(stories, use_cache=False).logits.log_softmax(-1)
            return float((dense.exp() * (dense - sparse)).sum(-1)[:, 64:].mean())

        ours = divergence()
        with random_scores(model):
            random = divergence()
        with budget(model, topk=0, window=16 + 28):
            window = divergence()
    assert ours < 0.7 * random
    assert ours < window
