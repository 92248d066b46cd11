"""Decoding by steps: what `generate` writes is what transformers' own loop writes, graph or not."""

import copy

import pytest
import torch
from recorded_graph import RecordedGraph, recording
from sparsek_kernels.pytorch import decode
from transformers import GenerationMixin, LogitsProcessor

import sparsek_cli.models as models
from sparsek_cli.errors import SparsekError
from sparsek_cli.models.causal_lm import SparseKCausalLMMixin
from sparsek_cli.models.generation import cuda_graphs as graphs
from sparsek_cli.models.generation import kept_decoders, why_eager

OPTIONS = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}


@pytest.fixture
def ids():
    return torch.randint(4, 128, (2, 14))


@pytest.fixture
def acted(monkeypatch):
    """Graphs are recorded and replayed on the CPU; returns those that were captured."""
    made = []

    class Counted(RecordedGraph):
        def __init__(self):
            super().__init__()
            made.append(self)

    monkeypatch.setattr(SparseKCausalLMMixin, "fused_steps", False)  # kernels do not run here
    monkeypatch.setattr(why_eager, "has_graphs", lambda device: True)
    monkeypatch.setattr(why_eager.dispatch, "explain", lambda *_: ("triton", "acted"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Counted)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(decode, "_asks", lambda device: False)
    return made


def their_loop(model, monkeypatch, *args, **options):
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "_sample", GenerationMixin._sample)
        return model.generate(*args, **options)


CHOICES = [
    {},
    {"eos_token_id": list(range(4, 64)), "pad_token_id": 0},
    {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9},
    {"do_sample": True, "min_p": 0.05, "eos_token_id": list(range(4, 40)), "pad_token_id": 3},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},  # these look at the text
    {"max_time": 60.0},
    {"num_return_sequences": 2, "do_sample": True, "top_k": 0},
]


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: "+".join(choice) or "greedy")
@pytest.mark.parametrize("graphed", [False, True], ids=["eager", "graph"])
def test_writes_what_transformers_writes(request, monkeypatch, sparse_model, ids, choice, graphed):
    model = sparse_model("llama", topk=4, window=4, sinks=1)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    options = {**OPTIONS, **choice, "attention_mask": mask}
    torch.manual_seed(1)
    expected = their_loop(model, monkeypatch, ids, **options)
    made = request.getfixturevalue("acted") if graphed else []
    for _ in range(2):  # the second time with the graph that the first one left
        torch.manual_seed(1)
        assert torch.equal(model.generate(ids, **options), expected)
    assert len(made) == graphed and (not graphed or made[0].replays > 8)


@pytest.mark.parametrize("choice", [{}, {"eos_token_id": list(range(4, 30)), "pad_token_id": 0}])
def test_scores_and_the_cache_come_back(acted, monkeypatch, family, sparse_model, ids, choice):
    model = sparse_model(family, topk=4, window=4, sinks=1)
    asked = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True}
    options = {**OPTIONS, **choice, **asked}
    theirs = their_loop(model, monkeypatch, ids, **options)
    mine = model.generate(ids, **options)
    assert torch.equal(mine.sequences, theirs.sequences)
    for name in ("scores", "logits"):
        assert len(getattr(mine, name)) == len(getattr(theirs, name))
        for a, b in zip(getattr(mine, name), getattr(theirs, name), strict=True):
            torch.testing.assert_close(a, b)
    assert acted
    layers = (out.past_key_values.layers for out in (mine, theirs))
    for a, b in zip(*layers, strict=True):
        assert a.tokens_seen == b.tokens_seen
        assert torch.equal(a.state.positions, b.state.positions)


def test_a_given_cache_goes_on_after_a_graph(acted, sparse_model, ids):
    model = sparse_model("qwen2", topk=4, window=4, sinks=1)
    cache = models.SparseKCache(model.config)
    first = model.generate(ids, past_key_values=cache, **OPTIONS)
    kept = copy.deepcopy(cache)
    text = torch.cat([first, torch.randint(4, 128, (2, 5))], dim=1)
    second = model.generate(text, past_key_values=cache, **OPTIONS)
    assert torch.equal(second, model.generate(text, **OPTIONS))
    assert torch.equal(second, model.generate(text, past_key_values=kept, **OPTIONS))
    assert len(acted) == 1  # one graph for all of it


def test_a_changed_model_gets_another_graph(acted, sparse_model, ids):
    model = sparse_model("llama", topk=4, window=4, sinks=1)

    def expected():
        text = ids
        for _ in range(9):
            text = torch.cat([text, model(text, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        return text

    with torch.no_grad():
        model.generate(ids, **OPTIONS)
        with models.random_scores(model):
            assert torch.equal(model.generate(ids, **OPTIONS), expected())
        with models.budget(model, topk=2):
            assert torch.equal(model.generate(ids, **OPTIONS), expected())
        weight = torch.nn.Parameter(model.lm_head.weight.flip(0).clone())
        model.lm_head.weight = weight
        assert torch.equal(model.generate(ids, **OPTIONS), expected())
        weight.copy_(weight.flip(0))  # in place: a graph reads what is there
        assert torch.equal(model.generate(ids, **OPTIONS), expected())
    assert len(acted) == 4
    assert len(kept_decoders._graphs[model]) <= kept_decoders.KEPT_GRAPHS


def test_hooks_run_at_every_token(acted, sparse_model, ids):
    model = sparse_model("llama", topk=4, window=4, sinks=1)
    calls = []
    handle = model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    model.generate(ids, **OPTIONS)
    assert len(calls) == 9 and not acted
    handle.remove()
    model.generate(ids, **OPTIONS)
    assert acted


def test_what_cannot_be_captured_runs_eagerly(acted, monkeypatch, sparse_model, ids, caplog):
    model = sparse_model("llama", topk=4, window=4, sinks=1)
    expected = model.generate(ids, **OPTIONS)
    scorer = model.model.layers[0].self_attn.scorer
    plain = type(scorer).forward

    def waits(self, hidden_states, position_ids=None):
        assert float(hidden_states.sum()) == float(hidden_states.sum())
        return plain(self, hidden_states, position_ids)

    monkeypatch.setattr(type(scorer), "forward", waits)
    monkeypatch.setattr(why_eager, "_logged", set())
    monkeypatch.setattr(kept_decoders, "_graphs", type(kept_decoders._graphs)())
    with caplog.at_level("INFO", logger="sparsek_cli"):
        assert torch.equal(model.generate(ids, **OPTIONS), expected)
        assert torch.equal(model.generate(ids, **OPTIONS), expected)
    assert caplog.text.count("runs eagerly") == 1


def test_two_caches_at_once_are_refused_and_an_error_frees_the_decoder(sparse_model, ids):
    model = sparse_model("llama", topk=4, window=4, sinks=1)
    caches = [models.SparseKCache(model.config) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            model(ids, past_key_values=cache)
    decoder = graphs.Decoder(model, 2)
    places = torch.full((2,), 14)
    with (
        pytest.raises(SparsekError, match="another cache"),
        decoder.over(caches[0], places),
        decoder.over(caches[1], places),
    ):
        pass
    with decoder.over(caches[1], places), torch.no_grad():
        decoder.step()
    assert [cache.get_seq_length() for cache in caches] == [14, 15]
    with (
        pytest.raises(SparsekError, match="2 sequences"),
        graphs.Decoder(model, 3).over(caches[0], places),
    ):
        pass


class _Stops(LogitsProcessor):
    def __call__(self, input_ids, scores):
        if input_ids.shape[1] > 17:
            raise KeyboardInterrupt
        return scores


def test_an_interrupted_call_leaves_the_cache_usable(acted, sparse_model, ids):
    model = sparse_model("llama", topk=4, window=4, sinks=1)
    cache = models.SparseKCache(model.config)
    with pytest.raises(KeyboardInterrupt):
        model.generate(ids, past_key_values=cache, logits_processor=[_Stops()], **OPTIONS)
    assert cache.get_seq_length() == 18
    text = model.generate(ids, **OPTIONS)
    rest = model.generate(text[:, :19], past_key_values=cache, **{**OPTIONS, "max_new_tokens": 4})
    assert torch.equal(rest, text)
