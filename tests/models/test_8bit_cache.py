"""cache_dtype int8: half the bytes on every path, and close to the cache that holds numbers."""

import pytest
import torch

import sparsek_cli.models as models
from sparsek_cli.errors import UsageError
from sparsek_cli.models import SparseKCache, load_state, save_state


@pytest.fixture
def model(sparse_model):
    model = sparse_model("llama")
    with models.budget(model, cache_dtype="int8"):
        yield model


@pytest.fixture
def ids():
    return torch.randint(4, 128, (2, 60))


def relative_error(a, b):
    """Of half of all positions: at some a later layer selects otherwise, and differs by more."""
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1)).median())


@torch.no_grad()
def read(model, ids, step):
    """(logits of all positions, the cache) after reading `step` tokens at a time."""
    cache = SparseKCache(model.config)
    pieces = [model(part, past_key_values=cache).logits for part in ids.split(step, dim=1)]
    return torch.cat(pieces, dim=1), cache


@torch.no_grad()
def test_close_to_the_exact_cache_and_never_the_same(model, ids):
    coded, cache = read(model, ids, 1)
    with models.budget(model, cache_dtype="auto"):
        exact, full = read(model, ids, 1)
        assert "cache_dtype" not in model.config.sparsek
    assert 0 < relative_error(coded, exact) < 0.02
    assert cache.layers[0].keys.dtype == torch.int8
    assert cache.nbytes == models.sparsek_cache_bytes(model.config, torch.float32, 2)
    assert cache.nbytes < 0.75 * full.nbytes  # small heads: positions and scores weigh much
    chunks, _ = read(model, ids, 13)
    assert relative_error(chunks, exact) < 0.02


@torch.no_grad()
def test_generates_in_batches(model):
    rows = [torch.randint(4, 128, (length,)) for length in (50, 31)]
    batch, mask = torch.zeros(2, 50, dtype=torch.long), torch.zeros(2, 50, dtype=torch.long)
    for row, tokens in enumerate(rows):
        batch[row, -len(tokens) :], mask[row, -len(tokens) :] = tokens, 1
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    out = model.generate(batch, attention_mask=mask, **options)
    for row, tokens in enumerate(rows):
        assert torch.equal(out[row, 50:], model.generate(tokens[None], **options)[0, len(tokens) :])


@torch.no_grad()
def test_survives_a_file_and_is_refused_by_the_other_cache(model, ids, tmp_path):
    _, cache = read(model, ids, 20)
    save_state(cache, tmp_path / "state.safetensors", model)
    again, _ = load_state(tmp_path / "state.safetensors", model)
    word = ids[:, :1]
    expected = model(word, past_key_values=cache).logits
    assert torch.equal(model(word, past_key_values=again).logits, expected)
    with models.budget(model, cache_dtype="auto"), pytest.raises(UsageError, match="budget"):
        load_state(tmp_path / "state.safetensors", model)


def test_a_checkpoint_remembers_it(model, tmp_path):
    from transformers import AutoModelForCausalLM

    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.sparsek["cache_dtype"] == "int8"


def test_other_names_are_refused(model):
    with pytest.raises(UsageError, match="cache_dtype is 'int4'") as caught:
        models.set_budget(model, cache_dtype="int4")
    assert "int8" in caught.value.hint
