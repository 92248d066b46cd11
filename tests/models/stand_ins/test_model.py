"""Models whose query heads hold pairs that stand in for evicted ones."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import sparsek_cli as sparsek
import sparsek_cli.models as models
from sparsek_cli.errors import SparsekError, UsageError
from sparsek_cli.evaluation.policies.registry import make_policy
from sparsek_cli.models.config import check_settings
from sparsek_cli.models.scorer import FAINT
from sparsek_cli.training.parameters import choose_parameters

TOKENS = 24
UNEVEN = [[2, 5], 3]


@pytest.fixture
def ids():
    return torch.randint(4, 128, (2, TOKENS))


@pytest.fixture
def model(sparse_model):
    return sparse_model("qwen3", topk=UNEVEN, stand_ins=2)


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(ids, use_cache=False, **kwargs).logits


def test_they_count_from_the_first_evicted_pair_on(model, sparse_model, dense_model, ids):
    found = logits(model, ids)
    plain = logits(sparse_model("qwen3", topk=UNEVEN), ids)
    torch.testing.assert_close(found[:, :7], plain[:, :7], atol=1e-5, rtol=1e-5)  # 1 + 2 + 4 slots
    assert (found - plain)[:, 8:].abs().amax(-1).min() > 1e-4
    held = logits(sparse_model("qwen3", topk=TOKENS, stand_ins=1), ids)
    torch.testing.assert_close(held, logits(dense_model("qwen3"), ids), atol=1e-5, rtol=1e-5)
    with models.dense_attention(model):
        dense = logits(model, ids)
    torch.testing.assert_close(dense, logits(dense_model("qwen3"), ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gemma3n_text-shared"])
@torch.no_grad()
def test_decoding_chunks_padding_and_packing_equal_one_pass(name, sparse_model, ids):
    model = sparse_model(name, stand_ins=1)
    whole = logits(model, ids)
    for sizes in ([1] * TOKENS, [7, 1, 11, 5]):
        cache = models.SparseKCache(model.config)
        parts = [model(part, past_key_values=cache).logits for part in ids.split(sizes, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-5)
    if name == "gemma3n_text-shared":
        return
    padded = torch.cat([torch.zeros(2, 5, dtype=torch.long), ids], 1)
    mask = torch.ones_like(padded)
    mask[:, :5] = 0
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    left = logits(model, padded, attention_mask=mask, position_ids=places)[:, 5:]
    torch.testing.assert_close(left, whole, atol=1e-5, rtol=1e-5)
    bounds = torch.tensor([0, TOKENS, 2 * TOKENS], dtype=torch.int32)
    packed = logits(model, ids.view(1, -1), cu_seq_lens_q=bounds).view_as(whole)
    torch.testing.assert_close(packed, whole, atol=1e-5, rtol=1e-5)


def test_generate_writes_what_single_passes_would(model, ids):
    written = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(logits(model, written)[:, TOKENS - 1 : -1].argmax(-1), written[:, TOKENS:])


def test_every_pair_learns_whatever_else_does(model, ids):
    model.train()
    model(ids, labels=ids, use_cache=False).loss.backward()
    for attention in models.sparsek_attentions(model):
        grad = attention.scorer.stand_ins.grad
        assert (grad.abs().amax(-1) > 0).all() and torch.isfinite(grad).all()


@pytest.mark.parametrize("how", ["concurrent", "refit", "gates"])
def test_they_learn_from_the_loss_however_scorers_learn(model, how):
    choose_parameters(model, "all", scorers=how)
    for attention in models.sparsek_attentions(model):
        assert attention.scorer.stand_ins.requires_grad
        assert not attention.scorer.stand_ins.refitted  # or the fit would undo what they learned
        assert attention.scorer.weight.refitted == (how == "refit")


@torch.no_grad()
def written_under(policy, model, ids):
    """Logits of the last tokens, read one by one after the others were a prompt."""
    with policy.applied(model):
        cache = policy.new_cache(model)
        model(ids[:, :-4], past_key_values=cache)
        policy.end_prompt(model, cache)
        parts = ids[:, -4:].split(1, dim=1)
        return torch.cat([model(part, past_key_values=cache).logits for part in parts], 1)


def test_rivals_have_none(model, sparse_model, ids):
    plain = sparse_model("qwen3", topk=UNEVEN)
    for name in ("window", "random"):
        found = []
        for one in (model, plain):
            with make_policy(name, seed=1).applied(one):
                found.append(logits(one, ids))
        torch.testing.assert_close(*found, atol=0, rtol=0)
    for name in ("dense", "snapkv", "h2o"):
        found = [written_under(make_policy(name), one, ids[:1]) for one in (model, plain)]
        torch.testing.assert_close(*found, atol=0, rtol=0)
    with make_policy("sparsek").applied(model):
        assert not torch.equal(logits(model, ids), logits(plain, ids))


@pytest.fixture
def folder(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_they_are_saved_and_stay_float32(folder, model, ids):
    loaded, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for own, other in zip(*map(models.sparsek_attentions, (loaded, model)), strict=True):
        assert own.scorer.stand_ins.dtype == torch.float32
        assert torch.equal(own.scorer.stand_ins, other.scorer.stand_ins)
    assert torch.isfinite(logits(loaded, ids)).all()


@pytest.mark.parametrize("change", ["missing", "another shape"])
def test_weights_that_do_not_belong_to_the_config_are_refused(folder, change):
    file = folder / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("scorer.stand_ins"))
    pairs = weights.pop(name)
    if change == "another shape":
        weights[name] = pairs[:, :1].contiguous()
    save_file(weights, file, metadata={"format": "pt"})
    from sparsek_cli.hub import resolve
    from sparsek_cli.loading import load_model

    with pytest.raises(SparsekError, match="stand_ins"):
        load_model(resolve(str(folder)), device=torch.device("cpu"), dtype=torch.float32)


def test_a_model_without_trained_ones_hardly_notices_them(sparse_model, ids):
    config = sparse_model("qwen3", stand_ins=1).config
    new = AutoModelForCausalLM.from_config(config).eval()
    for attention in models.sparsek_attentions(new):
        pairs = attention.scorer.stand_ins
        assert (pairs[..., -2] == FAINT).all() and not pairs[..., :-2].any()


def test_what_was_loaded_stays_beside_a_scorer_s_missing_part(folder, model):
    file = folder / "model.safetensors"
    weights = load_file(file)
    left = {name: w for name, w in weights.items() if not name.endswith("scorer.slopes")}
    save_file(left, file, metadata={"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for own, other in zip(*map(models.sparsek_attentions, (loaded, model)), strict=True):
        assert torch.equal(own.scorer.stand_ins, other.scorer.stand_ins)


@pytest.mark.parametrize(
    "scorer",
    [
        {"type": "linear", "stand_ins": 0},
        {"type": "linear", "stand_ins": 17},
        {"type": "mlp", "stand_ins": "1"},
        {"type": "mlp", "stand_ins": True},
        {"type": "random", "stand_ins": 1},
    ],
)
def test_numbers_that_none_has_are_refused(scorer):
    with pytest.raises(UsageError, match="stand_ins"):
        check_settings({"scorer": scorer}, layers=2, heads=2)


def test_the_block_says_how_many(folder):
    block = json.loads((folder / "config.json").read_text())["sparsek"]
    assert block["scorer"] == {"type": "linear", "stand_ins": 2}
    assert AutoConfig.from_pretrained(folder).sparsek["scorer"] == block["scorer"]


def test_they_go_along_with_scorers_alone(
    folder, model, dense_model, tokenizer, tmp_path, monkeypatch, ids
):
    for name in ("CACHE", "STATE"):
        monkeypatch.setenv(f"SPARSEK_{name}_DIR", str(tmp_path / name))
    dense_model("qwen3").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    scorers = sparsek.export_scorers(folder, tmp_path / "scorers").out
    put_on, _ = sparsek.load(tmp_path / "base", scorers=scorers, device="cpu", dtype="float32")
    assert torch.equal(logits(put_on, ids), logits(model, ids))
    merged = sparsek.merge(tmp_path / "base", scorers, tmp_path / "merged").out
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(merged), ids), logits(model, ids)
    )


def test_weights_that_lie_on_disk_have_them(folder, model, tmp_path, ids):
    """They are there only while the scorer's own forward runs."""
    places = dict.fromkeys(
        ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu"
    )
    places |= {"model.layers.0": "disk", "model.layers.1": "disk"}
    there = AutoModelForCausalLM.from_pretrained(
        folder, device_map=places, offload_folder=tmp_path / "offloaded"
    )
    torch.testing.assert_close(logits(there, ids), logits(model, ids))
    written = [one.generate(ids, max_new_tokens=4, do_sample=False) for one in (there, model)]
    assert torch.equal(*written)
