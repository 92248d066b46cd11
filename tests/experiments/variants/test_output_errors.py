"""Attention's outputs are drawn towards the teacher's, early in a run."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from experiments.variants.output_errors import EARLY, OutputErrors
from sparsek_cli.models import sparsek_config_from
from sparsek_cli.training.losses.objectives import Objective, attach
from sparsek_cli.training.losses.teacher import FrozenTeacher, OwnTeacher


def sparse_model(dense_config, topk=4):
    torch.manual_seed(0)
    block = {"topk": topk, "window": 4, "sinks": 1}
    return AutoModelForCausalLM.from_config(sparsek_config_from(dense_config("llama"), block))


def batch():
    torch.manual_seed(1)
    return {"input_ids": torch.randint(3, 128, (2, 48)), "roles": torch.ones(2, 48).long()}


def attached(model, own=False, weight=2.0):
    teacher = OwnTeacher(model) if own else FrozenTeacher(model, torch.float32)
    errors = OutputErrors(model, teacher, weight)
    attach(model.train(), Objective(), teacher, [errors])
    return errors


@pytest.mark.parametrize("own", [False, True])
def test_an_error_where_keys_were_dropped_and_none_where_not(dense_config, own):
    model = sparse_model(dense_config)
    attached(model, own)
    # Twice the mean error of two sequences: below 2 x 2 x 1.
    assert 0.01 < model(**batch())["sums"][4] < 4
    assert model.eval()(**batch())["sums"][4] == 0
    wide = sparse_model(dense_config, topk=64)
    attached(wide, own)
    assert wide(**batch())["sums"][4].abs() < 1e-6


def test_the_base_feels_it_with_checkpointing_as_without(dense_config):
    grads = []
    for checkpointing in (False, True):
        model = sparse_model(dense_config)
        if checkpointing:
            newer = getattr(model, "activation_checkpointing_enable", None)
            (newer or model.gradient_checkpointing_enable)({"use_reentrant": False})
        attached(model)
        model(**batch())["sums"][4].backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        grads.append(found)
        assert found["model.layers.1.self_attn.o_proj.weight"].abs().sum() > 0
    assert all(torch.allclose(grads[0][n], grads[1][n], atol=1e-5) for n in grads[0])


def test_it_ends_after_the_first_part_of_a_run(dense_config, monkeypatch):
    model = sparse_model(dense_config)
    errors = attached(model)
    first = model(**batch())["sums"][4]
    weights = []
    for step in range(9):
        errors.on_step_begin(None, SimpleNamespace(global_step=step, max_steps=16), None)
        weights.append(errors.weight)
    assert EARLY == 0.25 and weights == [2.0, 1.5, 1.0, 0.5, 0, 0, 0, 0, 0]
    assert model(**batch())["sums"][4] == 0 < first
    # Nothing is distilled here: the teacher need not run any more.
    monkeypatch.setattr(FrozenTeacher, "states", None)
    model(**batch())
