"""Scores against future attention: the definition, by hand, and where its gradient goes."""

import numpy as np
import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM

from sparsek_cli.data.packing import collate
from sparsek_cli.models import dense_attention, sparsek_attentions, sparsek_config_from
from sparsek_cli.models.attention import dense_attention_forward, dense_mask
from sparsek_cli.training.losses.future import ATTENTION, FutureAttention
from sparsek_cli.training.losses.objectives import Objective, attach
from sparsek_cli.training.losses.teacher import OwnTeacher

WINDOW = 4


def sparse_model(dense_config, **settings):
    block = {"topk": 2, "window": WINDOW, "sinks": 1, **settings}
    torch.manual_seed(0)
    config = sparsek_config_from(dense_config("llama"), block)
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


def by_hand(model, ids, roles):
    """Mean over layers and heads of 1 - correlation for one document, from dense attention maps."""
    tokens = len(ids)
    maps = []

    def spy(module, query, key, value, mask, scaling=None, **kwargs):
        key_of_each = key[0].repeat_interleave(2, 0)
        logits = query[0] @ key_of_each.transpose(1, 2) * scaling
        hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        maps.append(logits.masked_fill(hidden, -torch.inf).softmax(-1))
        return dense_attention_forward(module, query, key, value, mask, scaling=scaling, **kwargs)

    AttentionInterface.register("sparsek_spy", spy)
    AttentionMaskInterface.register("sparsek_spy", dense_mask)
    inputs = {}
    handles = [
        a.scorer.register_forward_hook(lambda m, x, y, i=a.layer_idx: inputs.update({i: y[0][0]}))
        for a in sparsek_attentions(model)
    ]
    model.model(input_ids=ids[None], use_cache=False)
    for handle in handles:
        handle.remove()
    with dense_attention(model), torch.no_grad():
        model.config._attn_implementation = "sparsek_spy"
        model.model(input_ids=ids[None], use_cache=False)
    age = torch.arange(tokens)[:, None] - torch.arange(tokens)
    answers = torch.zeros(tokens, dtype=torch.bool)
    answers[:-1] = roles[1:] == 2
    last = tokens - WINDOW - tokens // 8
    losses = []
    for layer, weights in enumerate(maps):
        logs = weights.log().masked_fill(age < WINDOW, -16).clamp_min(-16)
        for head, scores in enumerate(inputs[layer]):
            group = logs[2 * head : 2 * head + 2]
            alike = []
            for rows in (torch.ones_like(answers), answers):
                target = group[:, rows].amax((0, 1))
                pair = torch.stack([scores[1:last], target[1:last]])
                alike.append(torch.corrcoef(pair.detach())[0, 1])
            losses.append(1 - max(alike))
    return torch.stack(losses).mean()


def test_it_is_the_correlation_with_the_largest_later_attention(dense_config):
    model = sparse_model(dense_config)
    made = batch(starts=((0,),))
    objective = Objective(lm=0.0, future=1.0)
    attach(model, objective, OwnTeacher(model, attention=ATTENTION), FutureAttention(model))
    got = model(**made)["sums"][4]
    expected = by_hand(model, made["input_ids"][0], made["roles"][0])
    assert got.item() == pytest.approx(expected.item(), abs=1e-4)


def test_packed_documents_are_weighed_by_their_length(dense_config):
    model = sparse_model(dense_config)
    future = FutureAttention(model)
    attach(model, Objective(future=1.0), OwnTeacher(model, attention=ATTENTION), future)
    made = batch(starts=((0, 24), (0, 24)))
    together = model(**made)["sums"][4]
    apart = []
    for row in (0, 1):
        for part in (slice(0, 24), slice(24, 48)):
            one = {"input_ids": made["input_ids"][row : row + 1, part]}
            one["roles"] = made["roles"][row : row + 1, part].clone()
            apart.append(model(**one)["sums"][4])
    assert together.item() == pytest.approx(sum(apart).item() / 2, abs=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_scorers_feel_it_and_slopes_do_not(dense_config, checkpointing):
    model = sparse_model(dense_config)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    future = FutureAttention(model)
    attach(model, Objective(lm=0.0, future=1.0), OwnTeacher(model, attention=ATTENTION), future)
    sums = model(**batch())["sums"]
    (sums[4] + 0 * sums[0]).backward()
    for name, parameter in model.named_parameters():
        felt = parameter.grad is not None and parameter.grad.abs().sum() > 1e-5
        assert felt == name.endswith("scorer.weight"), name


def test_training_brings_scores_closer(dense_config):
    model = sparse_model(dense_config)
    future = FutureAttention(model)
    attach(model, Objective(lm=0.0, future=1.0), OwnTeacher(model, attention=ATTENTION), future)
    weights = [p for n, p in model.named_parameters() if n.endswith("scorer.weight")]
    optimizer = torch.optim.Adam(weights, lr=0.02)
    losses = []
    for _ in range(30):
        loss = model(**batch())["sums"][4]
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        model.zero_grad()
    assert losses[-1] < 0.5 * losses[0]
    future.close()
    assert not any(a.scorer._forward_hooks for a in sparsek_attentions(model))
