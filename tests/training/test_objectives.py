"""Losses: equal to what they replace, blind across documents, and felt by the scorers."""

import numpy as np
import pytest
import torch

from sparsek_cli.data.packing import collate
from sparsek_cli.models import sparsek_config_from
from sparsek_cli.training.losses.objectives import Objective, attach, count_targets, detach
from sparsek_cli.training.losses.teacher import FrozenTeacher, OwnTeacher


def batch(rows=2, length=48, starts=((0,), (0, 20)), seed=0):
    rng = np.random.default_rng(seed)
    items = []
    for row in range(rows):
        roles = rng.integers(0, 3, length).astype(np.int8)
        roles[list(starts[row])] = 0
        items.append(
            {
                "input_ids": rng.integers(3, 128, length),
                "roles": roles,
                "starts": starts[row],
                "index": row,
            }
        )
    made = collate(items)
    made.pop("indices")
    return made


def sparse_model(dense_config, family="llama", **settings):
    from transformers import AutoModelForCausalLM

    block = {"topk": 6, "window": 6, "sinks": 1, **settings}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(sparsek_config_from(dense_config(family), block))


def by_hand(model, made):
    """[text, answer] sums from whole logits, each document on its own."""
    sums = torch.zeros(2)
    length = made["input_ids"].shape[1]
    bounds = made["cu_seq_lens"].tolist()
    for first, last in zip(bounds, bounds[1:], strict=False):
        row, a, b = first // length, first % length, (last - 1) % length + 1
        ids, roles = made["input_ids"][row, a:b], made["roles"][row, a:b]
        logits = model(ids[None]).logits[0, :-1].float()
        nll = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        sums += torch.stack([nll[roles[1:] == 1].sum(), nll[roles[1:] == 2].sum()])
    return sums


def test_chunked_packed_loss_equals_separate_documents(family, dense_model):
    model, made = dense_model(family), batch()
    with torch.no_grad():
        expected = by_hand(model, made)
        attach(model, Objective(loss_chunk=7))
        sums = model(**made)["sums"]
    assert torch.allclose(sums[:2], expected, rtol=1e-4)
    assert (sums[2:] == 0).all()


def test_sparse_packed_loss_equals_separate_documents(dense_config):
    model, made = sparse_model(dense_config).eval(), batch()
    with torch.no_grad():
        expected = by_hand(model, made)
        attach(model, Objective())
        sums = model(**made)["sums"]
        detach(model)
        assert torch.allclose(sums[:2], expected, rtol=1e-4)
        assert "logits" in model(made["input_ids"])


def test_the_loss_is_two_means():
    objective = Objective(lm=2.0, distill=0.5, answer_weight=3.0)
    loss = objective.combine(torch.tensor([10.0, 4.0, 5.0, 1.0, 6.0]), torch.tensor([5, 2, 3]))
    assert loss.item() == pytest.approx(2 * (2 + 3 * 2) + 0.5 * (1 + 3 * 0.5) + 2)
    assert Objective().combine(torch.zeros(5), torch.tensor([0, 0, 0])).item() == 0.0
    assert count_targets(torch.tensor([[2, 1, 2, 2, 0]])).tolist() == [1, 2, 1]


def test_distillation_reaches_the_scorers_and_vanishes_without_a_gap(dense_config):
    model = sparse_model(dense_config)
    made = batch()
    attach(model, Objective(lm=0.0, distill=1.0), OwnTeacher(model))
    sums = model.train()(**made)["sums"]
    assert sums[2] > 0 and model.training
    sums[2:].sum().backward()
    for name, parameter in model.named_parameters():
        if name.endswith("scorer.weight"):
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name

    wide = sparse_model(dense_config, topk=64)
    attach(wide, Objective(lm=0.0, distill=1.0), OwnTeacher(wide))
    assert wide.train()(**made)["sums"][2:].abs().max() < 1e-3


def test_a_frozen_teacher_stays_where_the_model_was(dense_config):
    model, made = sparse_model(dense_config), batch()
    inputs = {"input_ids": made["input_ids"]}
    teacher = FrozenTeacher(model, torch.float32)
    before = teacher.states(**inputs)
    assert torch.allclose(before, OwnTeacher(model).states(**inputs), atol=1e-5)
    names = set(dict(model.named_parameters()))
    attach(model, Objective(distill=1.0), teacher)
    assert set(dict(model.named_parameters())) == names
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    assert torch.equal(teacher.states(**inputs), before)
    assert not torch.allclose(OwnTeacher(model).states(**inputs), before, atol=1e-2)
    model.train()(**made)["sums"].sum().backward()
    assert all(p.grad is None for p in teacher.model.parameters())


def test_checkpointing_changes_no_gradient(dense_config):
    grads = []
    for checkpointing in (False, True):
        model = sparse_model(dense_config).train()
        if checkpointing:
            switch = getattr(model, "activation_checkpointing_enable", None)
            (switch or model.gradient_checkpointing_enable)({"use_reentrant": False})
        attach(model, Objective(distill=1.0, loss_chunk=16), OwnTeacher(model))
        model(**batch())["sums"].sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        assert torch.allclose(grad, grads[1][name], rtol=1e-3, atol=1e-4), name


def test_a_batch_without_targets_still_has_a_graph(dense_model):
    model, made = dense_model("llama").train(), batch()
    made["roles"].zero_()
    attach(model, Objective())
    sums = model(**made)["sums"]
    sums.sum().backward()
    assert (sums == 0).all() and model.model.embed_tokens.weight.grad is not None
