"""Models that mix layers: only those that attend to everything are converted."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer, LinearAttentionLayer

import sparsek_cli.models as models
from sparsek_cli.errors import SparsekError, UsageError
from sparsek_cli.models import block_attention
from sparsek_cli.models.cache.bytes import sliding_bytes

SLIDES = {"num_hidden_layers": 3, "sliding_window": 6,
          "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}  # fmt: skip


@pytest.fixture
def ids():
    return torch.randint(4, 128, (2, 32))


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(ids, use_cache=False, **kwargs).logits


def test_only_full_layers_are_converted(sparse_model):
    model = sparse_model("gemma3_text", **SLIDES)
    assert [attention.layer_idx for attention in models.sparsek_attentions(model)] == [1]
    cache = models.SparseKCache(model.config)
    kinds = [DynamicSlidingWindowLayer, models.SparseKCacheLayer, DynamicSlidingWindowLayer]
    assert [type(layer) for layer in cache.layers] == kinds and not cache.all_slots


def test_options_of_layers_come_for_each_or_for_all(sparse_model, monkeypatch):
    """transformers 5.17 gives one dict for all layers."""
    from sparsek_cli.models.cache import slots

    model = sparse_model("gemma3_text", **SLIDES)
    kinds, options = slots.get_layer_types_and_kwargs(model.config)
    older = {"sliding_window": SLIDES["sliding_window"]}
    for given in ([older] * len(kinds), older):
        monkeypatch.setattr(slots, "get_layer_types_and_kwargs", lambda config, g=given: (kinds, g))
        layers = models.SparseKCache(model.config).layers
        assert [layer.sliding_window for layer in (layers[0], layers[2])] == [6, 6]


@torch.no_grad()
def test_each_kind_of_layer_is_counted(sparse_model, dense_model, ids):
    model = sparse_model("gemma3_text", **SLIDES)
    cache, dense = models.SparseKCache(model.config), DynamicCache(config=model.config)
    for part in (ids[:, :4], ids[:, 4:]):
        model(part, past_key_values=cache)
        with models.dense_attention(model):
            model(part, past_key_values=dense)
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in dense.layers)
        assert held == models.dense_cache_bytes(
            model.config, cache.get_seq_length(), torch.float32, 2
        )
    assert cache.nbytes == models.sparsek_cache_bytes(model.config, torch.float32, 2)
    assert cache.nbytes - cache.slot_bytes == sliding_bytes(model.config, None, torch.float32, 2)


@torch.no_grad()
def test_a_window_needs_no_mask_however_long_the_text(monkeypatch, sparse_model, dense_model):
    ids = torch.randint(4, 128, (2, 41))
    expected = logits(dense_model("gemma3_text", **SLIDES), ids)
    monkeypatch.setattr(block_attention, "_QUERIES", 7)
    model = sparse_model("gemma3_text", topk=41, **SLIDES)
    torch.testing.assert_close(logits(model, ids), expected, atol=1e-5, rtol=1e-5)
    cache = models.SparseKCache(model.config)
    parts = [model(part, past_key_values=cache).logits for part in ids.split([20, 17, 4], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
def test_packed_documents_do_not_see_each_other(dense, sparse_model, ids):
    model = sparse_model("gemma3_text", **SLIDES)
    lengths = [19, 13, 21, 11]
    bounds = torch.tensor([0, 19, 32, 53, 64], dtype=torch.int32)

    def run(tokens, **kwargs):
        if dense:
            with models.dense_attention(model):
                return logits(model, tokens, **kwargs)
        return logits(model, tokens, **kwargs)

    alone = torch.cat([run(part[None])[0] for part in ids.flatten().split(lengths)])
    packed = run(ids, cu_seq_lens_q=bounds).flatten(0, 1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_padded_rows_generate_as_they_do_alone(sparse_model, ids):
    model = sparse_model("gemma3_text", **SLIDES)
    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    batch, mask = ids.clone(), torch.ones_like(ids)
    batch[0, :11], mask[0, :11] = 0, 0
    together = model.generate(batch, attention_mask=mask, **options)
    alone = model.generate(ids[:1, 11:], **options)
    assert torch.equal(together[0, 11:], alone[0])
    beams = model.generate(ids, num_beams=2, **options)
    assert beams.shape == (2, 41)


def test_states_know_no_documents(sparse_model, ids):
    model = sparse_model("qwen3_next")
    kinds = [type(layer) for layer in models.SparseKCache(model.config).layers]
    assert kinds == [LinearAttentionLayer, models.SparseKCacheLayer]
    bounds = torch.tensor([0, 20, 64], dtype=torch.int32)
    with pytest.raises(SparsekError, match="one document's states into the next"):
        model(ids, cu_seq_lens_q=bounds, use_cache=False)


@torch.no_grad()
def test_a_state_that_takes_single_tokens_is_not_given_more(sparse_model, ids):
    """transformers' own Jamba continues a text wrongly by more than one token."""
    model = sparse_model("jamba")
    expected = logits(model, ids)
    cache = models.SparseKCache(model.config)
    model(ids[:, :20], past_key_values=cache)
    with pytest.raises(SparsekError, match="one token at a time"):
        model(ids[:, 20:], past_key_values=cache)
    last = model(ids[:, 20:], past_key_values=cache, logits_to_keep=1).logits
    torch.testing.assert_close(last, expected[:, -1:], atol=1e-4, rtol=1e-4)


def test_topk_of_other_layers_is_null(sparse_model, dense_config):
    model = sparse_model("gemma3_text", topk=[None, [2, 3], None], **SLIDES)
    assert models.layer_budget(model.config, 1).topk == (2, 3)
    base = dense_config("gemma3_text", **SLIDES)
    with pytest.raises(UsageError, match="topk of layer 0 is 3, and that layer has no SparseK"):
        models.sparsek_config_from(base, {"topk": [3, 3, None]})


@torch.no_grad()
def test_a_family_may_slide_in_some_layers(sparse_model, dense_model, ids):
    sliding = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
    model = sparse_model("qwen2", topk=32, **sliding)
    expected = logits(dense_model("qwen2", **sliding), ids)
    torch.testing.assert_close(logits(model, ids), expected, atol=1e-5, rtol=1e-5)


def test_where_all_layers_slide_there_is_nothing_to_convert(dense_config):
    base = dense_config("ministral", layer_types=["sliding_attention"] * 2)
    config = models.sparsek_config_from(base, {})
    with pytest.raises(UsageError, match="nothing to convert"):
        models.family_of(base).sparsek_causal_lm(config)


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
def test_no_argument_of_attention_is_dropped(dense, sparse_model, ids):
    model = sparse_model("llama")
    with pytest.raises(SparsekError, match="with a_new_one, which SparseK does not know"):
        if dense:
            with models.dense_attention(model):
                model(ids, a_new_one=30.0)
        else:
            model(ids, a_new_one=30.0)
    model(ids, a_new_one=None)


@pytest.mark.parametrize("argument", ["softcap", "s_aux"])
def test_what_attention_knows_counts_in_both_of_its_forms(argument, sparse_model, ids):
    model = sparse_model("llama", topk=ids.shape[1])
    value = 0.01 if argument == "softcap" else torch.full((model.config.num_attention_heads,), 3.0)
    plain = logits(model, ids)
    with torch.no_grad():
        sparse = model(ids, **{argument: value}).logits
        with models.dense_attention(model):
            dense = model(ids, **{argument: value}).logits
    torch.testing.assert_close(sparse, dense, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(sparse, plain, atol=1e-4)
