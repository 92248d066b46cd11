"""Scores at the border of what is kept: the definition, by hand, and where its gradient goes."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from sparsek_cli.conversion.calibrate.recorded import Recorded
from sparsek_cli.data.packing import collate
from sparsek_cli.models import sparsek_attentions, sparsek_config_from
from sparsek_cli.models.config import LayerBudget
from sparsek_cli.models.logits import Logits
from sparsek_cli.training.losses.future_attention import FutureAttention, aims, border_loss
from sparsek_cli.training.losses.objectives import Objective, attach, count_targets

WINDOW = 4


# Of the second one a layer without keys of its own reads the scores of another.
FAMILIES = ("llama", "gemma4_text-shared")


def sparse_model(dense_config, family="llama", **settings):
    block = {"topk": 2, "window": WINDOW, "sinks": 1, **settings}
    torch.manual_seed(0)
    config = sparsek_config_from(dense_config(family), block)
    return AutoModelForCausalLM.from_config(config).train()


def batch(starts=((0,), (0, 20)), length=48):
    rng = np.random.default_rng(0)
    items = []
    for row, begins in enumerate(starts):
        roles = rng.choice([1, 1, 1, 2], length).astype(np.int8)
        roles[list(begins)] = 0
        ids = rng.integers(3, 128, length)
        items.append({"input_ids": ids, "roles": roles, "starts": begins, "index": row})
    made = collate(items)
    made.pop("indices")
    return made


def losses_of(model, made, objective=None):
    """Sums of one batch, and the gradients after them all."""
    future, objective = FutureAttention(), objective or Objective(lm=0.0)
    attach(model, objective, None, [future])
    with future.attached():
        sums = model(**made)["sums"]
        objective.combine(sums, count_targets(made["roles"])).backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return sums.detach(), grads


@pytest.fixture
def recorded():
    torch.manual_seed(0)
    query, key = 3 * torch.randn(4, 40, 8), torch.randn(2, 40, 8)
    return Recorded(None, query, key, None, Logits(8**-0.5))


def test_a_head_with_slots_for_more_than_the_document_drops_nothing(recorded):
    answer = torch.zeros(1, 40, dtype=torch.bool)
    wanted = aims(
        recorded, answer, LayerBudget((5, 400), window=4, sinks=2, gate="straight_through")
    )
    alone = aims(recorded, answer, LayerBudget((5, 5), window=4, sinks=2, gate="straight_through"))
    assert torch.equal(wanted.weights[:, 0], alone.weights[:, 0]) and not wanted.weights[:, 1].any()
    slopes = torch.zeros(2)
    scores = torch.randn(2, 40, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (grad,) = torch.autograd.grad(border_loss(scores, slopes, wanted), scores)
    assert grad[0].any() and not grad[1].any()


def test_a_head_should_hold_what_later_queries_look_at_most(recorded):
    budget = LayerBudget((5, 3), window=4, sinks=2, gate="straight_through")
    wanted = aims(recorded, torch.zeros(1, 40, dtype=torch.bool), budget)
    logits = recorded.query @ recorded.key.repeat_interleave(2, 0).transpose(1, 2) * 8**-0.5
    maps = logits.masked_fill(torch.ones(40, 40).triu(1).bool(), -torch.inf).log_softmax(-1)
    age = torch.arange(40)[:, None] - torch.arange(40)
    maps = maps.masked_fill(age < 4, -16).clamp_min(-16)
    # The first query at which the smaller head must let go is the 2 + 4 + 3rd.
    moments = torch.linspace(9, 40, 9).long()[:-1].tolist()
    assert wanted.weights.shape == (len(moments), 2, 40)
    for number, query in enumerate(moments):
        for head, topk in enumerate((5, 3)):
            worth = maps[2 * head : 2 * head + 2, query:].amax((0, 1))[2 : query - 3]
            weights = wanted.weights[number, head]
            if len(worth) <= topk:
                assert not weights.any()
                continue
            best = worth.topk(topk).indices + 2
            assert set(weights.clamp_min(0).nonzero()[:, 0].tolist()) <= set(best.tolist())
            dropped = weights.clamp_max(0).nonzero()[:, 0]
            assert not set(dropped.tolist()) & set(best.tolist())
            assert (weights[:2] == 0).all() and (weights[query - 3 :] == 0).all()
            assert -weights.clamp_max(0).sum() == pytest.approx(0.5)


def test_nothing_is_asked_where_all_fits(recorded):
    nowhere = torch.zeros(1, 40, dtype=torch.bool)
    assert aims(recorded, nowhere, LayerBudget(40, 4, 2, "straight_through")) is None
    assert aims(recorded, nowhere, LayerBudget(0, 4, 2, "straight_through")) is None


def test_the_loss_pulls_keys_across_the_border_and_vanishes_beyond_it(recorded):
    wanted = aims(recorded, torch.zeros(1, 40, dtype=torch.bool), LayerBudget(5, 4, 2, "log"))
    scores = torch.zeros(2, 40, requires_grad=True)
    border_loss(scores, torch.zeros(2), wanted).backward()
    pull = wanted.weights.sum(0)
    clear = pull.abs() > 1e-3
    assert (scores.grad[clear].sign() == -pull[clear].sign()).all()
    # One moment's keys on their sides by far: nothing is left to learn of them.
    one = type(wanted)(1, wanted.weights[-1:], wanted.candidates[-1:], wanted.last)
    assert border_loss(100 * one.weights[0].sign(), torch.zeros(2), one) < 1e-3
    # The other way round the threshold lies among those to drop: half of their 2, and all of the
    # others' 2, for none pulls more than it can.
    found = border_loss(-100 * one.weights[0].sign(), torch.zeros(2), one)
    assert found == pytest.approx(3.0, abs=0.01)


def test_packed_documents_are_weighed_by_their_length(dense_config):
    model = sparse_model(dense_config)
    together, _ = losses_of(model, batch(starts=((0, 24), (0, 24))))
    made, apart = batch(starts=((0, 24), (0, 24))), []
    for row in (0, 1):
        for part in (slice(0, 24), slice(24, 48)):
            one = {name: made[name][row : row + 1, part] for name in ("input_ids", "roles")}
            apart.append(losses_of(model, one)[0][4])
    assert together[4].item() == pytest.approx(sum(apart).item() / 2, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_scorers_feel_it_and_they_feel_nothing_else(family, dense_config):
    model = sparse_model(dense_config, family)
    for attention in sparsek_attentions(model):
        attention.scorer.shapes_input = False
    _, alone = losses_of(model, batch())
    _, both = losses_of(model, batch(), Objective(lm=1.0))
    felt = {name for name, grad in alone.items() if grad.abs().sum() > 1e-6}
    scorers = {n for n, _ in model.named_parameters() if ".scorer." in n}
    assert {n for n in scorers if n.endswith("weight")} <= felt <= scorers
    assert not any(n.endswith("slopes") for n in felt)
    assert all(torch.allclose(both[name], alone[name], atol=1e-6) for name in felt)
    newer = getattr(model, "activation_checkpointing_enable", None)
    (newer or model.gradient_checkpointing_enable)({"use_reentrant": False})
    _, again = losses_of(model, batch(), Objective(lm=1.0))
    assert again.keys() == both.keys()
    assert all(torch.allclose(again[name], both[name], atol=1e-5) for name in both)


def test_layers_that_read_a_layer_s_keys_pull_at_its_scores(dense_config):
    """As many losses as layers that attend to them, their mean, each by its own queries."""
    model, made = sparse_model(dense_config, FAMILIES[1]), batch()
    together = losses_of(model, made)[0][4].item()
    future, alone = FutureAttention(), {}
    attach(model, Objective(lm=0.0), None, [future])
    with future.attached():
        model(**made)
        alone |= {layer: loss.item() for layer, loss in future._losses.items()}
    assert [*alone] == [1, 3] and alone[1] != pytest.approx(alone[3], rel=1e-3)
    assert together == pytest.approx(sum(alone.values()) / 2, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_learn_to_hold_what_is_looked_at(family, dense_config):
    """And a pass without training neither asks nor changes anything."""
    model = sparse_model(dense_config, family, topk=6)
    future = FutureAttention()
    attach(model, Objective(lm=0.0), None, [future])
    weights = [p for n, p in model.named_parameters() if n.endswith("scorer.weight")]
    optimizer = torch.optim.Adam(weights, lr=0.02)
    losses = []
    with future.attached():
        for _ in range(40):
            loss = model(**batch())["sums"][4]
            losses.append(loss.item())
            loss.backward()
            optimizer.step()
            model.zero_grad()
        assert losses[-1] < 0.8 * losses[0]
        assert model.eval()(**batch())["sums"][4] == 0
