"""Scorers that learn beside the base: budgets drawn by step, fits in closed form, and resuming."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from verbs import finetune

from sparsek_cli.data.packing import collate
from sparsek_cli.errors import UsageError
from sparsek_cli.models import (
    dense_attention,
    layer_budget,
    sparsek_attentions,
    sparsek_config_from,
)
from sparsek_cli.recipes.load import load_recipe
from sparsek_cli.recipes.schema_finetune import FinetuneRecipe
from sparsek_cli.training import refit_scorers as refit
from sparsek_cli.training.budgets import DrawnBudgets, scaled

ADAPT = ["train=all", "objective={lm: 0.1, distill: 1}", "budgets=[8, 4]", "steps=4",
         "save_steps=2", "min_learning_rate=0.2"]  # fmt: skip


def sparse_model(dense_config, family="llama", **settings):
    block = {"topk": [[8, 24], [0, 4]], "window": 4, "sinks": 2, **settings}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(sparsek_config_from(dense_config(family), block))


def test_budgets_grow_and_shrink_alike_and_a_step_decides(dense_config):
    model = sparse_model(dense_config)
    twice = scaled(model, 2 * (9 + 4) + 2)  # the mean of topk is 9
    assert twice == {"topk": [[16, 48], [0, 8]], "window": 8}
    assert scaled(model, 4) == {"topk": [[1, 4], [0, 1]], "window": 1}
    assert scaled(sparse_model(dense_config, topk=8), 26)["topk"] == [16, 16]
    drawn = DrawnBudgets(model, (4, 2), 64, seed=0)
    seen = []
    for step in [*range(12), 3]:
        state = type("State", (), {"global_step": step})
        drawn.on_step_begin(None, state, None)
        seen.append(layer_budget(model.config, 0))
        drawn.on_step_end(None, state, None)
        assert model.config.sparsek["topk"] == [[8, 24], [0, 4]]
        assert model.config.sparsek["window"] == 4
    assert len(set(seen)) == 2 and seen[-1] == seen[3]


def test_a_step_of_the_whole_sequence_is_dense_attention(dense_config):
    model = sparse_model(dense_config).eval()  # a head of it has no slot but sinks and window
    before = dict(model.config.sparsek)
    ids = torch.randint(3, 128, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), dense_attention(model):
        dense = model(ids, use_cache=False).logits
    drawn = DrawnBudgets(model, (1,), 64, seed=0)
    drawn.on_step_begin(None, type("State", (), {"global_step": 0}), None)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, use_cache=False).logits, dense)
    drawn.on_step_end(None, None, None)
    assert model.config.sparsek == before
    with torch.no_grad():
        assert (model(ids, use_cache=False).logits - dense).abs().max() > 1e-3


def test_queries_of_layers_that_read_a_layer_s_keys_are_fitted_too(dense_config, monkeypatch):
    model, seen = sparse_model(dense_config, "gemma4_text-shared", topk=3), []
    rng = np.random.default_rng(0)
    item = {"input_ids": rng.integers(3, 128, 40), "roles": np.ones(40, np.int8), "starts": (0,)}
    use = refit._use

    def noted(fits, documents, asking, module, inputs, query, *rest):
        seen.append((module, inputs, query))
        return use(fits, documents, asking, module, inputs, query, *rest)

    monkeypatch.setattr(refit, "_use", noted)
    refit.refit(model, [collate([{**item, "index": 0}])], torch.device("cpu"))
    (own,) = sparsek_attentions(model)
    assert len(seen) == 2 and all(module is own for module, _, _ in seen)
    assert seen[0][1] is seen[1][1] and not torch.equal(seen[0][2], seen[1][2])


@pytest.mark.parametrize("scorer", ["linear", "mlp"])
def test_a_fit_follows_later_attention_and_keeps_slopes(dense_config, scorer):
    """Of one spread, and the same again while the base stays."""
    model = sparse_model(dense_config, topk=6, scorer={"type": scorer})
    for attention in sparsek_attentions(model):
        for parameter in attention.scorer.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    rng = np.random.default_rng(0)
    items = []
    for row in range(8):
        roles = rng.choice([1, 1, 1, 2], 96).astype(np.int8)
        roles[[0, 40]] = 0
        ids = rng.integers(3, 128, 96)
        items.append({"input_ids": ids, "roles": roles, "starts": (0, 40), "index": row})
    batches = [collate(items[:4]), collate(items[4:])]
    slopes = [a.scorer.slopes.detach().clone() for a in sparsek_attentions(model)]
    refit.refit(model, batches, torch.device("cpu"))
    first = [a.scorer.weight.detach().clone() for a in sparsek_attentions(model)]
    for attention, before in zip(sparsek_attentions(model), slopes, strict=True):
        assert torch.equal(attention.scorer.slopes, before)
    spread = []
    handle = sparsek_attentions(model)[0].scorer.register_forward_hook(
        lambda module, args, output: spread.append(output[0].std(-1))
    )
    model.eval()(batches[0]["input_ids"])
    handle.remove()
    assert 1 < spread[0].mean() < 4
    # The base did not move: fitted again, each head takes the same map (the first layer, whose
    # inputs do not depend on what is kept).
    refit.refit(model, batches, torch.device("cpu"))
    assert torch.allclose(sparsek_attentions(model)[0].scorer.weight, first[0], atol=1e-4)


@pytest.mark.parametrize(
    "how", ["concurrent", *(pytest.param(n, marks=pytest.mark.slow) for n in ("refit", "frozen"))]
)
def test_interrupted_and_resumed_equals_uninterrupted(
    recipe, sparse_checkpoint, tmp_path, monkeypatch, interrupted, how
):
    monkeypatch.setattr(refit, "EVERY", 2)
    model, words = sparse_checkpoint(), [*ADAPT, f"scorer_training={how}"]
    whole = finetune(recipe(*words, model=model, out="whole"))
    interrupted(recipe(*words, model=model), 3)
    done = finetune(recipe(*words, model=model), resume=True)
    assert done.loss == whole.loss and done.held_out_loss == whole.held_out_loss
    ours, theirs = (load_file(tmp_path / n / "model.safetensors") for n in ("out", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    before = load_file(model / "sparsek.safetensors")
    moved = [n for n in before if not torch.equal(before[n], theirs[n])]
    assert bool(moved) == (how != "frozen")
    assert not any(name.endswith("slopes") for name in moved)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train=scorers", "scorer_training=frozen"], "nothing to train"),
        (["train=lora", "lora.scorers=false", "scorer_training=concurrent"], "lora.scorers"),
        (["scorer_training=concurrent", "compile=true"], "compile: false"),
    ],
)
def test_what_says_nothing_is_refused(recipe, words, message):
    with pytest.raises(UsageError, match=message):
        recipe(*words)


@pytest.mark.parametrize("key", ["stand_ins", "sparsek.stand_ins"])
@pytest.mark.parametrize("base", ["scratch-llama", "lora"])
def test_stand_ins_are_convert_s_to_fit(key, base):
    with pytest.raises(UsageError, match=f"unknown key '{key}'") as refused:
        load_recipe(FinetuneRecipe, base, [f"{key}=1"], verb="finetune")
    assert "`sparsek convert` fits them, with --again" in refused.value.hint


@pytest.mark.parametrize("word", ["scorer_training=frozen", "budgets=[4]"])
def test_a_dense_model_has_no_scorers_to_train(recipe, dense_checkpoint, word):
    with pytest.raises(UsageError, match="dense model") as refused:
        finetune(recipe("train=all", word, model=dense_checkpoint("llama")))
    instead = refused.value.hint.split(",")[0].removeprefix("set ")
    assert finetune(recipe("train=all", word, instead, model=dense_checkpoint("llama"))).steps == 3


def test_stand_ins_alone_learn_while_scorers_are_fitted(
    recipe, sparse_model, tokenizer, tmp_path, monkeypatch
):
    """It was refused as nothing to train, which is so where a model has none."""
    monkeypatch.setattr(refit, "EVERY", 2)

    def made(name, *words, **settings):
        sparse_model("llama", window=8, **settings).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return recipe("train=scorers", *words, model=tmp_path / name)

    for words, model in ((["scorer_training=refit"], {"topk": 8}), ([], {"topk": 0})):
        with pytest.raises(UsageError, match="nothing to train: the model has no stand-ins"):
            finetune(made("none", *words, **model))
    words = ("scorer_training=refit", "keep_better=false")
    assert finetune(made("some", *words, topk=8, stand_ins=1)).steps == 3
    before, after = (load_file(tmp_path / n / "model.safetensors") for n in ("some", "out"))
    moved = {name.split(".scorer.")[-1] for name in after if not after[name].equal(before[name])}
    assert moved == {"weight", "bias", "stand_ins"}
