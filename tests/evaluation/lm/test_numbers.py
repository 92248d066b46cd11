"""Answers of a model whose output is no number are no answers."""

import pytest
import torch

import sparsek_cli as sparsek
from sparsek_cli.errors import SparsekError
from sparsek_cli.evaluation.lm import generation, loglikelihood

NONE = "the model's output is not a number"


def overflowing(checkpoints, tokenizer, folder):
    """A dense model that float16 is too narrow for, as it is for some that were trained."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoints[0])
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(3e5)
        model.model.layers[1].mlp.up_proj.weight.mul_(3e2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("baselines", [["dense"], ["window"], ["snapkv"]])
def test_a_model_that_overflows_has_no_recall_of_nought(
    checkpoints, tokenizer, tmp_path, baselines
):
    """It was a recall of 0.000 ±0.000: the largest of numbers that are none is one of them."""
    folder = overflowing(checkpoints, tokenizer, tmp_path / "model")
    settings = {"tasks": ["recall_1"], "lengths": [512], "limit": 2, "device": "cpu"}
    settings |= {"baselines": baselines, "out": str(tmp_path / "out")}
    assert sparsek.evaluate(str(folder), **settings, dtype="float32", max_new_tokens=2)
    with pytest.raises(SparsekError, match=NONE) as refused:
        sparsek.evaluate(str(folder), **settings, dtype="float16", overwrite=True)
    assert "float32" in refused.value.hint or "bfloat16" in refused.value.hint


def test_numbers_that_end_within_an_answer_end_it(recipe, console, monkeypatch):
    from verbs import evaluate

    real, told = generation.Answers._read, []

    def ending(self, tokens, *rest, **keys):
        logits = real(self, tokens, *rest, **keys)
        told.append(len(tokens))
        return logits * float("nan") if len(tokens) == 1 else logits

    monkeypatch.setattr(generation.Answers, "_read", ending)
    with pytest.raises(SparsekError, match=NONE):
        evaluate(recipe(tasks=["recall_1"], baselines=["dense"]), console)
    assert told.count(1) >= 1


def test_choices_of_no_number_have_no_likeliest():
    log_p = torch.zeros(2, 8).log_softmax(-1)
    assert loglikelihood._score(log_p, [3, 4])[0] < 0
    log_p[1] = float("nan")
    with pytest.raises(SparsekError, match=NONE):
        loglikelihood._score(log_p, [3, 4])
