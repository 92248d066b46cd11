"""Long inputs are read in chunks wherever nobody can tell, with the same state afterwards."""

import inspect

import pytest
import torch

import sparsek_cli.models as models


@pytest.fixture
def lengths(monkeypatch):
    """Lengths of the inputs that base models are given."""
    seen = []
    plain = models.modeling.SparseKModelMixin.forward

    def forward(self, *args, **kwargs):
        tokens = args[0] if args else kwargs.get("input_ids")
        seen.append((kwargs["inputs_embeds"] if tokens is None else tokens).shape[1])
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(models.modeling.SparseKModelMixin, "forward", forward)
    return seen


def slots(cache):
    """Positions of every layer, sorted: where a pair stands among the selected says nothing."""
    return [layer.state.positions.sort(1).values for layer in cache.layers]


@torch.no_grad()
@pytest.mark.parametrize("chunk", [2, 10, 78])
def test_chunks_leave_the_state_of_one_pass(family, sparse_model, lengths, chunk):
    model = sparse_model(family, topk=4, window=4, sinks=1)
    ids = torch.randint(4, 128, (2, 40))
    model.read_chunk = None
    whole = model(ids, logits_to_keep=1)
    assert lengths == [40]
    model.read_chunk = chunk
    parts = model(ids, logits_to_keep=1)
    assert max(lengths[1:]) == chunk // 2 and sum(lengths[1:]) == 40
    torch.testing.assert_close(parts.logits, whole.logits, atol=1e-5, rtol=1e-5)
    for a, b in zip(slots(parts.past_key_values), slots(whole.past_key_values), strict=True):
        assert torch.equal(a, b)
    assert parts.past_key_values.get_seq_length() == 40


@torch.no_grad()
def test_generate_reads_padded_prompts_beams_and_embeddings_in_chunks(sparse_model, lengths):
    model = sparse_model("llama", topk=4, window=4, sinks=1)
    ids, mask = torch.randint(4, 128, (2, 40)), torch.ones(2, 40, dtype=torch.long)
    mask[0, :23] = 0
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    embedded = model.get_input_embeddings()(ids)
    for more in ({"attention_mask": mask}, {"num_beams": 2}, {"inputs_embeds": embedded}):
        given = {**options, **more}
        tokens = () if "inputs_embeds" in more else (ids,)
        model.read_chunk = None
        expected = model.generate(*tokens, **given)
        model.read_chunk = 20
        lengths.clear()
        assert torch.equal(model.generate(*tokens, **given), expected)
        assert max(lengths) == (5 if "num_beams" in more else 10)


@torch.no_grad()
def test_what_needs_all_tokens_at_once_gets_them(sparse_model, lengths):
    model = sparse_model("llama", topk=4, window=4, sinks=1)
    model.read_chunk = 8
    ids = torch.randint(4, 128, (1, 40))
    model(ids)  # all logits
    model(ids, logits_to_keep=1, use_cache=False)
    model(ids, logits_to_keep=1, output_hidden_states=True)
    model(ids, logits_to_keep=1, position_ids=torch.arange(40)[None] % 20)  # packed documents
    with models.dense_attention(model):
        model(ids, logits_to_keep=1)
    with torch.enable_grad():
        model(ids, logits_to_keep=1)
    assert lengths == [40] * 6
    lengths.clear()
    assert model(ids, None, None, logits_to_keep=3).logits.shape[1] == 3
    assert lengths == [8] * 5
    model(ids[:, :18], logits_to_keep=3)
    assert lengths[5:] == [8, 7, 3]


def test_the_signature_is_the_familys(family, sparse_model):
    model = sparse_model(family)
    dense = inspect.signature(models.FAMILIES[family].causal_lm.forward)
    assert inspect.signature(type(model).forward) == dense


@torch.no_grad()
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_token_scores_alone_what_it_scores_among_others(sparse_model, kind):
    """So that the same token ties with its like, read in a prompt or written: the earlier stays."""
    model = sparse_model("llama", scorer={"type": kind})
    scorer = models.sparsek_attentions(model)[0].scorer
    for weight in scorer.parameters():
        weight.normal_()
    hidden = torch.randn(1, 200, 32)
    scores = scorer(hidden)[0]
    alone = [scorer(token)[0] for token in hidden.split(1, dim=1)]
    assert torch.equal(torch.cat(alone, dim=2), scores)


@torch.no_grad()
def test_a_call_that_fails_leaves_empty_slots(sparse_model, monkeypatch):
    """They are made where they are filled, and by whoever looks at them before."""
    model = sparse_model("llama", topk=4, window=4, sinks=1)
    cache, ids = models.SparseKCache(model.config), torch.randint(4, 128, (2, 9))
    attend = models.attention.sparsek.sparsek_attention

    def fail(*args, state, **kwargs):
        state.positions.fill_(7)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(models.attention.sparsek, "sparsek_attention", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(ids, past_key_values=cache)
    layer = cache.layers[0]
    assert layer.is_initialized and cache.batch_size == 2
    assert (layer.state.positions == -1).all() and not layer.state.keys.any()
    cache.reset()
    monkeypatch.setattr(models.attention.sparsek, "sparsek_attention", attend)
    read = model(ids, past_key_values=cache).logits
    assert torch.equal(read, model(ids, past_key_values=models.SparseKCache(model.config)).logits)
