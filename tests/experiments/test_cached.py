"""Positions by slot order: the model's own while nothing is evicted, without gaps after it."""

import pytest
import torch

from experiments.cached import Reader, SlotOrder, as_many_bytes
from sparsek_cli.models import sparsek_cache_bytes


def logits(reader, ids):
    return torch.cat(list(reader.read(ids)))


@pytest.fixture
def ids():
    return torch.randint(4, 128, (150,)).tolist()


def test_nothing_evicted_nothing_changes(sparse_model, ids):
    model = sparse_model("qwen3", topk=200, window=8, sinks=2)
    torch.testing.assert_close(
        logits(SlotOrder(model), ids), logits(Reader(model), ids), atol=1e-4, rtol=1e-4
    )


def test_kept_keys_stand_side_by_side(sparse_model, ids):
    """Against keys made anew at their places: the first layer's, which see no attention."""
    model = sparse_model("llama", topk=[[6, 3]] * 2, window=8, sinks=2)
    reader = SlotOrder(model)
    logits(reader, ids)
    reader.positions(1)  # turns all keys to the places before the next block
    layer = model.model.layers[0]
    hidden = layer.input_layernorm(model.model.embed_tokens(torch.tensor([ids])))
    state, first = reader.cache.layers[0].state, 0
    keys = layer.self_attn.k_proj(hidden).unflatten(2, (2, -1))
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    for head, k in enumerate((6, 3)):
        slots = slice(first, first + k + 10)
        first = slots.stop
        order = state.positions[0, slots].argsort()
        seen = state.positions[0, slots][order].long()
        assert len(seen) == k + 10 and int(seen.min()) == 0 and int(seen.max()) == 149
        places = torch.arange(-len(seen), 0)[None]
        plain = keys[:, seen, head][:, None]
        turned = apply_rotary_pos_emb(plain, plain, *model.model.rotary_emb(plain, places))[1]
        found = state.keys[0, slots][order]
        torch.testing.assert_close(found, turned[0, 0], atol=1e-4, rtol=1e-3)


def test_as_many_bytes_hold_more_slots(sparse_model):
    model = sparse_model("llama", topk=[[60, 30]] * 2, window=8, sinks=2)
    config = model.config
    before = sparsek_cache_bytes(config, torch.bfloat16)
    many = as_many_bytes(config)
    assert config.sparsek["topk"] == [[60, 30]] * 2 and many[0][0] > 63
    config.sparsek = {**config.sparsek, "topk": many, "cache_dtype": "int8"}
    assert 0.9 * before < sparsek_cache_bytes(config, torch.bfloat16) <= before
