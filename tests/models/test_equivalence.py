"""What a converted model computes: dense where nothing is dropped, causal and consistent always."""

import copy

import pytest
import torch

import sparsek_cli.models as models
from sparsek_cli.errors import SparsekError
from sparsek_cli.models.attention.dense import dense_mask

TOKENS = 24


@pytest.fixture
def ids():
    return torch.randint(4, 128, (2, TOKENS))


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(ids, use_cache=False, **kwargs).logits


@torch.no_grad()
def test_equals_dense_when_nothing_is_dropped(family, dense_model, sparse_model, ids):
    dense = dense_model(family)
    sparse = sparse_model(family, topk=TOKENS)
    torch.testing.assert_close(logits(sparse, ids), logits(dense, ids), atol=1e-5, rtol=1e-5)
    cached = sparse(ids, use_cache=True)
    assert isinstance(cached.past_key_values, models.SparseKCache)
    torch.testing.assert_close(cached.logits, logits(dense, ids), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_dropping_pairs_changes_logits(family, dense_model, sparse_model, ids):
    difference = logits(sparse_model(family), ids) - logits(dense_model(family), ids)
    assert difference[:, :8].abs().max() < 1e-4  # sinks + window + topk hold the first 8 tokens
    assert difference[:, 12:].abs().max() > 1e-2


@torch.no_grad()
def test_decoding_and_chunks_equal_prefill(family, sparse_model, ids):
    model = sparse_model(
        family, topk=[[2, 5, 1, 3], [3, 0, 4, 2]] if family in ("gpt_neox", "gpt2") else [[2, 5], 3]
    )
    whole = logits(model, ids)
    for sizes in ([1] * TOKENS, [7, 1, 11, 5]):
        cache = models.SparseKCache(model.config)
        parts = [model(part, past_key_values=cache).logits for part in ids.split(sizes, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-5)
        assert cache.get_seq_length() == TOKENS


@torch.no_grad()
def test_future_tokens_do_not_change_past_logits(family, sparse_model, ids):
    model = sparse_model(family)
    changed = ids.clone()
    changed[:, 15:] = torch.randint(4, 128, changed[:, 15:].shape)
    before, after = logits(model, ids), logits(model, changed)
    torch.testing.assert_close(before[:, :15], after[:, :15], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(before[:, 15:], after[:, 15:])


@torch.no_grad()
def test_scores_decide(family, sparse_model, ids):
    model = sparse_model(family)
    before = logits(model, ids)
    for attention in models.sparsek_attentions(model):
        attention.scorer.weight.neg_()
    assert (logits(model, ids) - before).abs().max() > 1e-2
    models.set_budget(model, topk=TOKENS)
    roomy = logits(model, ids)
    for attention in models.sparsek_attentions(model):
        attention.scorer.weight.neg_()
    torch.testing.assert_close(logits(model, ids), roomy, atol=1e-5, rtol=1e-5)


def test_gradients_reach_scorers_and_survive_checkpointing(family, sparse_model, ids):
    model = sparse_model(family).train()

    def gradients():
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return {name: weight.grad.clone() for name, weight in model.named_parameters()}

    plain = gradients()
    scorers = [name for name in plain if name.endswith("scorer.weight")]
    assert len(scorers) == 2 and all(plain[name].abs().max() > 0 for name in scorers)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        for name, gradient in gradients().items():
            torch.testing.assert_close(gradient, plain[name], atol=1e-6, rtol=1e-4, msg=name)


@torch.no_grad()
@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
def test_packed_documents_do_not_see_each_other(family, dense, sparse_model, ids):
    model = sparse_model(family)
    lengths = [9, 1, 14, 13, 11]  # documents end with rows, as collators pack them
    bounds = torch.tensor([0, 9, 10, 24, 37, 48], dtype=torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths])

    def run(**kwargs):
        if dense:
            with models.dense_attention(model):
                return model(use_cache=False, **kwargs).logits
        return model(use_cache=False, **kwargs).logits

    alone = [run(input_ids=document[None])[0] for document in ids.flatten().split(lengths)]
    expected = torch.cat(alone)
    flat = ids.view(1, -1)
    for kwargs in (
        {"input_ids": flat, "cu_seq_lens_q": bounds},
        {"input_ids": flat, "position_ids": positions[None]},
        {"input_ids": flat, "position_ids": positions[None], "cu_seq_lens_q": bounds},
        {"input_ids": ids, "position_ids": positions.view(2, -1)},
    ):
        got = run(**kwargs).flatten(0, 1)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_packing_mistakes_are_named(sparse_model, ids):
    model = sparse_model("llama")
    bounds = torch.tensor([0, 20, 48], dtype=torch.int32)
    with pytest.raises(SparsekError, match="cannot share a cache"):
        model(ids.view(1, -1), cu_seq_lens_q=bounds, use_cache=True)
    with pytest.raises(SparsekError, match="cannot share a cache"):
        cache = models.SparseKCache(model.config)
        model(ids.view(1, -1), cu_seq_lens_q=bounds, past_key_values=cache, use_cache=False)
    with pytest.raises(SparsekError, match="48 tokens"):
        model(ids.view(1, -1), cu_seq_lens_q=bounds[:2], use_cache=False)
    mask = torch.ones(1, 48, dtype=torch.long)
    mask[:, :3] = 0
    with pytest.raises(SparsekError, match="padding mask"):
        model(ids.view(1, -1), cu_seq_lens_q=bounds, attention_mask=mask, use_cache=False)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_has_no_influence(family, side, sparse_model, ids):
    model = sparse_model(family)
    lengths = [24, 13, 1]
    rows = [ids.flatten()[:length] for length in lengths]
    batch = torch.zeros(3, 24, dtype=torch.long)
    mask = torch.zeros(3, 24, dtype=torch.long)
    positions = torch.zeros(3, 24, dtype=torch.long)
    real = []
    for row, tokens in enumerate(rows):
        place = slice(24 - len(tokens), 24) if side == "left" else slice(0, len(tokens))
        batch[row, place], mask[row, place] = tokens, 1
        positions[row, place] = torch.arange(len(tokens))
        real.append(place)
    for use_cache in (False, True):
        got = model(batch, attention_mask=mask, position_ids=positions, use_cache=use_cache).logits
        for row, tokens in enumerate(rows):
            alone = logits(model, tokens[None])[0]
            torch.testing.assert_close(got[row, real[row]], alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_mask_is_over_all_tokens_or_over_the_new_ones(sparse_model, ids):
    """Of a prompt that is read in pieces, its whole mask was taken for each piece's last tokens."""
    model = sparse_model("llama")
    ids, mask = ids[:1], torch.ones_like(ids[:1])
    mask[0, :5] = 0
    whole = model(ids, attention_mask=mask).logits
    for pieces in ([mask] * 3, mask.split(8, dim=1), [mask[:, :8], mask[:, :16], mask]):
        cache = models.SparseKCache(model.config)
        parts = [
            model(part, attention_mask=given, past_key_values=cache).logits
            for part, given in zip(ids.split(8, dim=1), pieces, strict=True)
        ]
        torch.testing.assert_close(torch.cat(parts, dim=1)[:, 5:], whole[:, 5:])
    with pytest.raises(SparsekError, match="covers 10 of 24 tokens"):
        model(ids, attention_mask=torch.ones(1, 10, dtype=torch.long))
    with pytest.raises(SparsekError, match="covers 10 of 25 tokens, 24 of them read before"):
        model(ids[:, :1], attention_mask=mask[:, :10], past_key_values=cache)


@torch.no_grad()
def test_dense_attention_is_the_dense_model(family, dense_model, sparse_model, ids):
    dense, model = dense_model(family), sparse_model(family)
    sparse_logits = logits(model, ids)
    with models.dense_attention(model):
        torch.testing.assert_close(logits(model, ids), logits(dense, ids), atol=1e-5, rtol=1e-5)
        out = model(ids, use_cache=True)
        assert not isinstance(out.past_key_values, models.SparseKCache)
        with pytest.raises(SparsekError, match="SparseKCache"):
            model(ids, past_key_values=models.SparseKCache(model.config))
        expected = dense.generate(ids, max_new_tokens=4, do_sample=False)
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), expected)
        mask = torch.ones_like(ids)
        mask[0, :5] = 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        kwargs = {"attention_mask": mask, "position_ids": positions}
        torch.testing.assert_close(
            logits(model, ids, **kwargs)[mask.bool()],
            logits(dense, ids, **kwargs)[mask.bool()],
            atol=1e-5,
            rtol=1e-5,
        )
    assert torch.equal(logits(model, ids), sparse_logits)


@torch.no_grad()
def test_random_scores_agree_between_prefill_and_decode(family, sparse_model, ids):
    model = sparse_model(family)
    learned = logits(model, ids)
    with models.random_scores(model, seed=3):
        whole = logits(model, ids)
        cache = models.SparseKCache(model.config)
        parts = [model(part, past_key_values=cache).logits for part in ids.split(5, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-5)
    with models.random_scores(model, seed=4):
        assert not torch.allclose(logits(model, ids), whole)
    assert torch.equal(logits(model, ids), learned)


def test_random_scores_are_uniform_and_differ_by_head_layer_and_seed():
    positions = torch.arange(4096)[None]
    hidden = torch.zeros(1, 4096, 1)
    scores = models.RandomScorer(4, layer=1, seed=0)(hidden, positions)[0][0]
    assert abs(scores.mean().item() - 0.5) < 0.01 and abs(scores.std().item() - 0.2887) < 0.01
    others = [
        models.RandomScorer(4, layer=2, seed=0)(hidden, positions)[0][0],
        models.RandomScorer(4, layer=1, seed=1)(hidden, positions)[0][0],
        scores.roll(1, dims=0),
        scores.roll(1, dims=1),
    ]
    for other in others:
        assert abs(torch.corrcoef(torch.stack([scores.flatten(), other.flatten()]))[0, 1]) < 0.03


@torch.no_grad()
def test_budget_switch_restores_and_refuses_old_caches(sparse_model, ids):
    model = sparse_model("llama")
    before = logits(model, ids)
    cache = models.SparseKCache(model.config)
    model(ids, past_key_values=cache)
    snapshot = copy.deepcopy(model.config.sparsek)
    with models.budget(model, topk=0, window=7):
        window_only = logits(model, ids)
        assert not torch.allclose(window_only, before)
        with pytest.raises(SparsekError, match="make a new cache|cache was made"):
            model(ids[:, :1], past_key_values=cache)
    assert model.config.sparsek == snapshot and torch.equal(logits(model, ids), before)
    old = models.set_budget(model, topk=0, window=7)
    assert old == snapshot and torch.equal(logits(model, ids), window_only)
    # A window of 7 and no selected pairs: nothing a learned score could change.
    for attention in models.sparsek_attentions(model):
        attention.scorer.weight.neg_()
    assert torch.equal(logits(model, ids), window_only)


def test_gates_change_the_forward_only_where_they_should(sparse_model, ids):
    with torch.no_grad():
        plain = logits(sparse_model("llama"), ids)
        for gate in ("log", "kv"):
            assert not torch.allclose(logits(sparse_model("llama", gate=gate), ids), plain)


def test_dropout_and_masks_are_refused(sparse_model, ids):
    model = sparse_model("llama").train()
    with pytest.raises(SparsekError, match="2D padding mask|4 dimensions"):
        model(ids, attention_mask=torch.ones(2, 1, TOKENS, TOKENS, dtype=torch.bool))
    for attention in models.sparsek_attentions(model):
        attention.attention_dropout = 0.1
    with pytest.raises(SparsekError, match="dropout"):
        model(ids)


def test_sparsek_on_a_dense_model_is_refused(dense_model, ids):
    with pytest.raises(SparsekError, match="no scorer"):
        dense_model("llama", attn_implementation="sparsek")(ids)


@torch.no_grad()
def test_scores_stay_fp32_under_autocast_and_casts(sparse_model, ids):
    model = sparse_model("llama")
    scorer = models.sparsek_attentions(model)[0].scorer
    hidden = torch.randn(1, 5, 32)
    expected = scorer(hidden)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(scorer(hidden), expected, atol=0, rtol=0)
    model.to(torch.bfloat16)
    assert model.dtype == torch.bfloat16 and scorer.weight.dtype == torch.float32
    torch.testing.assert_close(scorer(hidden), expected, atol=0, rtol=0)
    assert logits(model, ids).dtype == torch.bfloat16


@torch.no_grad()
@pytest.mark.parametrize("gate", ["log", "kv"])
def test_soft_gates_decode_as_they_prefill(gate, sparse_model, ids):
    model = sparse_model("llama", gate=gate)
    whole = logits(model, ids)
    cache = models.SparseKCache(model.config)
    parts = [model(part, past_key_values=cache).logits for part in ids.split([5, 1, 1, 17], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-5)


def test_one_query_after_everything_needs_no_mask(monkeypatch):
    """Where transformers cannot look, as while a graph is captured, it would give one."""
    monkeypatch.setattr("sparsek_cli.models.attention.dense.sdpa_mask", lambda **given: given)
    assert dense_mask(2, 1, 41, q_offset=40) is None
    padded = torch.ones(2, 41, dtype=torch.bool)
    assert dense_mask(2, 1, 41, padded, q_offset=40)["attention_mask"] is padded
    place = torch.tensor(40)  # in a cache of fixed length
    for offset in (39, place):
        assert dense_mask(2, 1, 64, q_offset=offset)["q_offset"] is offset
