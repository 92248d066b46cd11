"""A saved state continues as the cache did, and is refused where it does not belong."""

import pytest
import torch
from safetensors.torch import save_file

import sparsek_cli.models as models
from sparsek_cli.errors import SparsekError, UsageError

OPTIONS = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}


@torch.no_grad()
def read(model, ids):
    cache = models.SparseKCache(model.config)
    model(ids, past_key_values=cache, logits_to_keep=1)
    return cache


@pytest.mark.parametrize("gate", ["straight_through", "log"])
def test_a_loaded_state_continues(family, sparse_model, tmp_path, gate):
    heads = [5, 2] if family not in ("gpt_neox", "gpt2") else 5
    model = sparse_model(family, topk=[heads, 3], window=4, sinks=1, gate=gate)
    ids = torch.randint(4, 128, (2, 30))
    text = torch.cat([ids, torch.randint(4, 128, (2, 4))], dim=1)
    cache = read(model, ids)
    models.save_state(cache, tmp_path / "one.safetensors", model, notes={"said": ["é", 1]})
    assert [path.name for path in tmp_path.iterdir()] == ["one.safetensors"]
    loaded, notes = models.load_state(tmp_path / "one.safetensors", model)
    assert notes == {"said": ["é", 1]}
    assert loaded.get_seq_length() == 30 and loaded.nbytes == cache.nbytes
    for a, b in zip(loaded.layers, cache.layers, strict=True):
        for name, tensor in b.state._tensors().items():
            assert torch.equal(getattr(a.state, name), tensor)
    expected = model.generate(text, past_key_values=cache, **OPTIONS)
    assert torch.equal(model.generate(text, past_key_values=loaded, **OPTIONS), expected)


def test_a_state_belongs_to_its_model(sparse_model, tmp_path):
    model = sparse_model("llama", topk=5, window=4, sinks=1)
    file = tmp_path / "state"
    models.save_state(read(model, torch.randint(4, 128, (1, 30))), file, model)
    cases = {
        "another model": sparse_model("llama", topk=5, window=4, sinks=1, seed=1),
        "another budget": sparse_model("llama", topk=6, window=4, sinks=1),
        "in float32, the model runs in bfloat16": sparse_model(
            "llama", topk=5, window=4, sinks=1, dtype="bfloat16"
        ),
    }
    for message, other in cases.items():
        with pytest.raises(UsageError, match=message):
            models.load_state(file, other)
    # The hint: back in the dtype it was saved in.
    models.load_state(file, cases["in float32, the model runs in bfloat16"].float())
    with torch.no_grad():  # fine-tuned since
        model.model.layers[0].self_attn.scorer.weight.add_(0.1)
    with pytest.raises(UsageError, match="another model"):
        models.load_state(file, model)


def test_files_that_are_no_states_are_refused(sparse_model, tmp_path):
    model = sparse_model("llama", topk=5, window=4, sinks=1)
    with pytest.raises(UsageError, match="no such file"):
        models.load_state(tmp_path / "none", model)
    (tmp_path / "text").write_text("hello " * 100)
    with pytest.raises(UsageError, match="damaged or no saved state"):
        models.load_state(tmp_path / "text", model)
    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(UsageError, match="no saved state"):
        models.load_state(tmp_path / "other", model)
    whole = tmp_path / "whole"
    models.save_state(read(model, torch.randint(4, 128, (1, 30))), whole, model)
    (tmp_path / "cut").write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(UsageError, match="damaged"):
        models.load_state(tmp_path / "cut", model)


def test_what_cannot_be_saved(sparse_model, tmp_path):
    model = sparse_model("llama", topk=5, window=4, sinks=1)
    with pytest.raises(SparsekError, match="nothing was read"):
        models.save_state(models.SparseKCache(model.config), tmp_path / "state", model)
    with pytest.raises(SparsekError, match="cannot write"):
        cache = read(model, torch.randint(4, 128, (1, 30)))
        models.save_state(cache, tmp_path / "nowhere" / "state", model)
