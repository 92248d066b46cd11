"""Chat with a converted model: the same turns, in a cache that stops growing."""

import pytest

from sparsek_cli.dialogue.drawing.sampling import Sampling
from sparsek_cli.dialogue.engine import Engine
from sparsek_cli.dialogue.session import Session

BUDGET = {"topk": 16, "window": 8, "sinks": 2}


@pytest.fixture(params=["llama", "gpt_neox"])
def sparse_model(request, dense_model):
    from transformers import AutoModelForCausalLM

    from sparsek_cli.models import sparsek_config_from

    dense = dense_model(request.param)
    model = AutoModelForCausalLM.from_config(sparsek_config_from(dense.config, BUDGET))
    model.load_state_dict(dense.state_dict(), strict=False)
    return model.eval()


def test_cache_stops_growing_and_equals_the_formula(sparse_model, tokenizer):
    from sparsek_cli.models import sparsek_cache_bytes

    session = Session(Engine(sparse_model, chunk=64), tokenizer, Sampling(max_new_tokens=4))
    session.load("A line of text.\n" * 20)
    short = session.stats()
    session.load("A line of text.\n" * 100)
    "".join(session.ask("What was it?"))
    long = session.stats()
    expected = sparsek_cache_bytes(sparse_model.config, sparse_model.dtype)
    assert session.engine.sparse
    assert short.kv_bytes == long.kv_bytes == expected
    assert long.context_tokens > 5 * short.context_tokens
    assert long.dense_kv_bytes > 5 * short.dense_kv_bytes


def test_turns_and_chunks_end_in_the_logits_of_one_prefill(sparse_model, tokenizer, monkeypatch):
    import torch

    from sparsek_cli.models.generation.cuda_graphs import Decoder

    fed = []
    read, step = Engine._read, Decoder.read

    def record_piece(self, piece):
        fed.extend(piece)
        read(self, piece)

    def record_words(self, words):
        fed.extend(words.tolist())
        return step(self, words)

    monkeypatch.setattr(Engine, "_read", record_piece)
    monkeypatch.setattr(Decoder, "read", record_words)
    session = Session(Engine(sparse_model, chunk=13), tokenizer, Sampling(max_new_tokens=5))
    session.load("The code is 42. " * 6)
    for question in ("What is the code?", "Are you sure?"):
        "".join(session.ask(question))
    session.engine.feed([])
    at_once = Engine(sparse_model, chunk=4096)
    read(at_once, fed)
    assert at_once.fed == session.engine.fed > 100
    torch.testing.assert_close(at_once._logits, session.engine._logits, atol=1e-4, rtol=1e-4)
