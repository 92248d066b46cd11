"""Layers without keys of their own attend to what another layer keeps, and put nothing there."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, cache_utils

import sparsek_cli.models as models
from sparsek_cli.errors import SparsekError
from sparsek_cli.models.attention import sharing
from sparsek_cli.models.attention.registration import replaced_attention

# Of 6 layers the last 3 share: 1 stores what 3 and 5 read.
SIZES = {"num_hidden_layers": 6, "num_kv_shared_layers": 3,
         "layer_types": 3 * ["sliding_attention", "full_attention"]}  # fmt: skip
CLOSE = 1e-8
PIECES = [9, 1, 11, 1, 1, 17]


KINDS = {
    "gemma4_text-shared": {},
    "gemma3n_text-shared": {"intermediate_size": 48, "activation_sparsity_pattern": 6 * [0.5]},
}


@pytest.fixture(
    params=["gemma4_text-shared", pytest.param("gemma3n_text-shared", marks=pytest.mark.slow)]
)
def make(request, sparse_model):
    """In float64, so that only what is read wrongly makes a difference."""

    def made(**options):
        kind = request.param
        return sparse_model(kind, **{"dtype": "float64", **SIZES, **KINDS[kind], **options})

    return made


@pytest.fixture
def ids():
    return torch.randint(4, 128, (2, sum(PIECES)))


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(ids, use_cache=False, **kwargs).logits


@torch.no_grad()
def in_pieces(model, ids, **kwargs):
    cache = models.SparseKCache(model.config)
    parts = ids.split(PIECES, dim=1)
    return torch.cat([model(part, past_key_values=cache, **kwargs).logits for part in parts], 1)


def apart(ours, theirs):
    """The largest difference over the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def test_one_layer_has_a_scorer_and_slots_for_all_that_read_it(make):
    model = make()
    assert models.sparse_layers(model.config) == (1,)
    (own,) = models.sparsek_attentions(model)
    readers = [m for m in model.modules() if isinstance(m, sharing.ReadingAttentionMixin)]
    assert own.is_read and [reader.layer_idx for reader in readers] == [3, 5]
    assert not any(hasattr(reader, "scorer") for reader in readers)
    kinds = [type(layer) for layer in models.SparseKCache(model.config).layers]
    nothing = getattr(cache_utils, "DummyLayer", None)  # transformers 5.17 has no name for it
    if nothing is not None:
        assert kinds[3:] == [nothing] * 3 and nothing not in kinds[:3]


@torch.no_grad()
def test_shared_layers_cost_nothing(make, ids):
    model = make()
    cache, dense = models.SparseKCache(model.config), DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    with models.dense_attention(model):
        model(ids, past_key_values=dense)
    assert cache.nbytes == models.sparsek_cache_bytes(model.config, torch.float64, 2)
    held = sum(x.keys.nbytes + x.values.nbytes for x in dense.layers if x.keys is not None)
    assert held == models.dense_cache_bytes(model.config, ids.shape[1], torch.float64, 2)


@pytest.mark.parametrize("gate", ["straight_through", "log", "kv"])
@pytest.mark.parametrize("topk", [3, [None, [1, 5], *[None] * 4]], ids=["even", "by head"])
def test_pieces_equal_one_pass(gate, topk, make, ids):
    model = make(gate=gate, topk=topk)
    assert apart(in_pieces(model, ids), logits(model, ids)) < CLOSE
    with torch.no_grad():
        before = logits(model, ids)
        for reader in (3, 5):  # their queries count, in other tests' equality too
            layer = model.base_model.layers[reader].self_attn
            kept = layer.q_proj.weight.clone()
            layer.q_proj.weight.copy_(kept.flip(0))
            assert apart(logits(model, ids), before) > 1e-3
            layer.q_proj.weight.copy_(kept)


def _twice(self, query, key, value, scores, settings):
    """A reader that inserts what the storing layer has inserted."""
    if self.cache is None:
        return sharing.sparsek_attention(query, key, value, scores, **settings)
    out, self.cache.state = sharing.sparsek_attention(
        query, key, value, scores, state=self.cache.state, **settings
    )
    return out


def _consumed(self, query, key, value, scores, settings):
    """A reader that looks into the state as the pass leaves it."""
    if self.cache is None:
        return sharing.sparsek_attention(query, key, value, scores, **settings)
    state = self.cache.state.clone()
    return sharing.sparsek_attention(query, key, value, scores, state=state, **settings)[0]


def _alone(self, query, key, value, scores, settings):
    """A reader that sees the keys of the pass and nothing before it."""
    return sharing.sparsek_attention(query, key, value, scores, **settings)


@pytest.mark.parametrize("reads", [_twice, _consumed, _alone])
def test_other_ways_to_read_are_found(reads, make, ids, monkeypatch):
    model = make()
    assert apart(in_pieces(model, ids), logits(model, ids)) < CLOSE
    monkeypatch.setattr(sharing.Stored, "attend", reads)
    assert apart(in_pieces(model, ids), logits(model, ids)) > 1e-3


@torch.no_grad()
def test_readers_see_what_the_storing_layer_selected(make, ids):
    """With its queries they put out what it does, in one pass, in pieces and token by token."""
    model, seen = make(), []

    def watched(attend):
        def look(module, query, *args, **kwargs):
            if kwargs.get("sparsek_stores") is not None:
                seen[:] = [query, attend(module, query, *args, **kwargs)]
                return seen[1]
            if kwargs.get("sparsek_reads") is not None:
                out, _ = attend(module, seen[0], *args, **kwargs)
                torch.testing.assert_close(out, seen[1][0])
                readers.append(module.layer_idx)
            return attend(module, query, *args, **kwargs)

        return look

    readers = []
    with replaced_attention(models.ATTENTION, watched):
        logits(model, ids)
        in_pieces(model, ids)
    assert readers == [3, 5] * (1 + len(PIECES))


@torch.no_grad()
def test_padding_that_goes_on_into_a_later_piece(make, ids):
    model = make()
    mask = torch.ones_like(ids)
    mask[0, :13] = 0  # beyond the first two pieces, and into the third
    places = (mask.cumsum(1) - 1).clamp(min=0)
    cache, found, end = models.SparseKCache(model.config), [], 0
    for part in ids.split(PIECES, dim=1):
        start, end = end, end + part.shape[1]
        found.append(
            model(
                part,
                attention_mask=mask[:, :end],
                position_ids=places[:, start:end],
                past_key_values=cache,
            ).logits  # fmt: skip
        )
    found = torch.cat(found, 1)
    assert apart(found[:1, 13:], logits(model, ids[:1, 13:])) < CLOSE
    assert apart(found[1:], logits(model, ids[1:])) < CLOSE


@torch.no_grad()
def test_int8_slots_are_read_as_they_are(make, ids):
    model = make()
    exact = in_pieces(model, ids)
    with models.budget(model, cache_dtype="int8"):
        codes = in_pieces(model, ids)
    assert 0 < apart(codes, exact) < 0.1


@torch.no_grad()
def test_a_fork_goes_on_by_itself(make, ids):
    model = make()
    cache = models.SparseKCache(model.config)
    model(ids[:, :20], past_key_values=cache)
    fork = models.fork(cache)
    expected = logits(model, ids)[:, 20:]
    for one in (fork, cache):
        assert apart(model(ids[:, 20:], past_key_values=one).logits, expected) < CLOSE


def test_gradients_come_through_readers_and_checkpoints(make, ids):
    """To keys, scores and all that made them: as without checkpoints."""
    grads = {}
    for checkpoints in (False, True):
        model = make(dtype="float32").train()
        if checkpoints:
            enable = getattr(model, "activation_checkpointing_enable", None)
            (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
        model(ids, labels=ids, use_cache=False).loss.backward()
        grads[checkpoints] = {n: p.grad for n, p in model.named_parameters()}
    for name, grad in grads[False].items():
        torch.testing.assert_close(grads[True][name], grad, msg=name)
    # Without what readers give back the scorer would learn something else.
    alone = make(dtype="float32").train()
    for layer in (3, 5):
        alone.base_model.layers[layer].self_attn.o_proj.weight.data.zero_()
    alone(ids, labels=ids, use_cache=False).loss.backward()
    scorer = "model.layers.1.self_attn.scorer.weight"
    assert not torch.allclose(dict(alone.named_parameters())[scorer].grad, grads[False][scorer])


def test_autocast_and_a_second_device_s_type(make, ids):
    """What goes from layer to layer can be moved, as accelerate does it."""
    model = make(dtype="float32")
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert apart(in_pieces(model, ids).float(), logits(model, ids).float()) < 0.1
    stored = sharing.Stored(1, torch.zeros(1, 2, 3), torch.zeros(2), None)
    assert stored.to(torch.device("meta")).scores.is_meta


@torch.no_grad()
def test_where_no_layer_slides(make, ids):
    """Steps are no graph, nor by our own loop: some layers' caches hold nothing."""
    from sparsek_cli.models.generation.why_eager import _obstacle

    model = make(layer_types=6 * ["full_attention"], per_layer_config={}, topk=3)
    assert models.sparse_layers(model.config) == (0, 1, 2)
    assert apart(in_pieces(model, ids), logits(model, ids)) < CLOSE
    cache = models.SparseKCache(model.config)
    model(ids[:1], past_key_values=cache)
    assert _obstacle(model, cache) == "some layers have a cache of another kind"
    out = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
    said = logits(model, out)[:, ids.shape[1] - 1 : -1].argmax(-1)
    assert torch.equal(out[:, ids.shape[1] :], said)
    with pytest.raises(SparsekError, match="cannot be joined"):
        models.DecodingBatch(model, 2).join(cache, 5)


def test_a_model_cut_short_says_what_is_missing():
    """Layers run one by one, as some tools do, have nobody to hand them keys."""
    with pytest.raises(SparsekError, match="did not run before it"):
        sharing.take({})


@pytest.mark.parametrize("kind", ["gemma4_text-shared", "gemma4_unified_text-shared"])
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_where_one_token_s_logits_are_wanted_readers_see_one(kind, padded, sparse_model, ids):
    """As in the dense model; what the slots hold after a pass is what its last token sees."""
    model, counts = sparse_model(kind, dtype="float64"), []
    mask = torch.ones_like(ids)
    mask[0, : 13 * padded] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)

    def watched(attend):
        def look(module, query, *args, **kwargs):
            if kwargs.get("sparsek_reads") is not None:
                counts.append(query.shape[2])
            return attend(module, query, *args, **kwargs)

        return look

    whole = model(ids, attention_mask=mask, position_ids=places, use_cache=False).logits
    cache, end = models.SparseKCache(model.config), 0
    with replaced_attention(models.ATTENTION, watched):
        for part in ids.split([20, 13, 1, 6], dim=1):
            start, end = end, end + part.shape[1]
            last = model(
                part, attention_mask=mask[:, :end], position_ids=places[:, start:end],
                past_key_values=cache, logits_to_keep=1,
            ).logits  # fmt: skip
            assert last.shape[1] == 1 and apart(last, whole[:, end - 1 : end]) < CLOSE
    assert counts == [1] * 4
    # What is asked of all tokens is computed of all.
    out = model(ids, use_cache=True, logits_to_keep=1, output_hidden_states=True)
    assert all(states.shape[1] == ids.shape[1] for states in out.hidden_states)
    for gate in ("log", "kv"):
        soft = sparse_model(kind, dtype="float64", gate=gate)
        last = soft(ids, use_cache=True, logits_to_keep=1).logits
        assert apart(last, logits(soft, ids)[:, -1:]) < CLOSE
