"""A saved state continues as the cache did, and is refused where it does not belong."""

import random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig

import sparsek_cli.models as models
from sparsek_cli.errors import SparsekError, UsageError
from sparsek_cli.models.cache.state_file import fingerprint

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
        with pytest.raises(UsageError, match=message) as refused:
            models.load_state(file, other)
        if message == "another budget":  # the hint, followed
            assert f"/budget 10 and then /load-state {file}; in Python" in refused.value.hint
            assert refused.value.hint.endswith("set_budget(model, topk=5)")
            models.set_budget(other, topk=5)
            models.load_state(file, other)
    models.set_budget(model, cache_dtype="int8")
    with pytest.raises(UsageError, match="another budget") as refused:
        models.load_state(file, model)
    assert "--cache-dtype auto" in refused.value.hint
    models.set_budget(model, cache_dtype="auto")
    models.load_state(file, model)
    other = sparse_model("llama", topk=5, window=3, sinks=1)
    with pytest.raises(UsageError, match="another budget") as refused:
        models.load_state(file, other)
    assert "as it was converted" in refused.value.hint
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


@pytest.mark.parametrize("version", [0, 2, 12])
def test_another_version_of_the_format_is_named(sparse_model, tmp_path, version):
    """It was "no saved state"."""
    model, file = sparse_model("llama", topk=5, window=4, sinks=1), tmp_path / "state"
    models.save_state(read(model, torch.randint(4, 128, (1, 30))), file, model)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file(load_file(file), file, metadata | {"format": f"sparsek-state-{version}"})
    with pytest.raises(UsageError, match=f"of format {version}, and .* reads format 1") as refused:
        models.load_state(file, model)
    assert "the version that wrote it" in refused.value.hint


def test_what_cannot_be_saved(sparse_model, tmp_path):
    model = sparse_model("llama", topk=5, window=4, sinks=1)
    with pytest.raises(SparsekError, match="nothing was read"):
        models.save_state(models.SparseKCache(model.config), tmp_path / "state", model)
    with pytest.raises(SparsekError, match="cannot write"):
        cache = read(model, torch.randint(4, 128, (1, 30)))
        models.save_state(cache, tmp_path / "nowhere" / "state", model)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, make_sparse):
    """(model, tensors, metadata) by gate and cache dtype, of a state that loads."""
    folder, made = tmp_path_factory.mktemp("saved"), {}
    for gate, cache_dtype in (("log", "auto"), ("straight_through", "int8")):
        model = make_sparse("llama", topk=[[5, 2], 3], window=4, sinks=1, gate=gate)
        models.set_budget(model, cache_dtype=cache_dtype)
        file = folder / gate
        models.save_state(read(model, torch.randint(4, 128, (1, 30))), file, model, notes=[1])
        with safe_open(file, "pt") as opened:
            made[gate] = model, load_file(file), opened.metadata()
    return made


LONG = str(10**30)
METADATA = [
    *((key, None) for key in ("model", "budgets", "tokens", "heads", "notes", "format")),
    *((key, text) for key in ("budgets", "tokens", "heads")
      for text in ("", "{", "[" * 100_000, "null", "3", "[]", "[2]", "[2, 2, 2]", '["2", "2"]',
                   "[true, true]", "[-1, -1]", f"[{LONG}, {LONG}]", "[NaN, NaN]", "[1.5, 1.5]",
                   "[[2], [2]]", '{"a": 1}')),
    ("tokens", "[30, 29]"), ("tokens", "[0, 0]"), ("tokens", "[4, 4]"), ("heads", "[2, 1]"),
    ("notes", "{"), ("notes", "nonsense"), ("format", "sparsek-state-2"),
]  # fmt: skip


@pytest.mark.parametrize("gate", ["log", "straight_through"])
@pytest.mark.parametrize(("key", "text"), METADATA, ids=[f"{k}-{t}"[:40] for k, t in METADATA])
def test_forged_metadata_is_refused(saved, tmp_path, gate, key, text):
    model, tensors, metadata = saved[gate]
    forged = {k: v for k, v in metadata.items() if k != key}
    save_file(tensors, tmp_path / "state", forged if text is None else forged | {key: text})
    with pytest.raises(
        UsageError, match="damaged|no saved state|another (model|budget)|format 2"
    ) as error:
        models.load_state(tmp_path / "state", model)
    assert error.value.hint


def filled(value):
    return lambda tensor: torch.full_like(tensor, value)


CHANGES = {
    "double": lambda t: t.double() if t.dtype != torch.float64 else t.float(),
    "half": lambda t: t.half(),
    "bool": lambda t: t.bool(),
    "longer": lambda t: torch.cat([t, t]),
    "flat": lambda t: t.flatten(),
    "scalar": lambda t: torch.zeros((), dtype=t.dtype),
    "empty": lambda t: t[:0],
    "wider": lambda t: torch.cat([t, t], dim=-1),
}
VALUES = {
    "nan": (filled(float("nan")), ("keys", "values", "scores", "support", "tau", "key_scale")),
    "inf": (filled(float("inf")), ("keys", "values", "scores", "support", "tau", "key_scale")),
    "far": (filled(30), ("positions",)), "below": (filled(-2), ("positions", "seen")),
    "more": (filled(31), ("seen",)), "huge": (filled(2**62), ("seen",)),
}  # fmt: skip


@pytest.mark.parametrize("gate", ["log", "straight_through"])
def test_forged_tensors_are_refused(saved, tmp_path, gate):
    model, tensors, metadata = saved[gate]
    forged = {}
    for name in (n for n in tensors if n.startswith("layers.1.")):
        own = name.rpartition(".")[2]
        forged[name, "gone"] = {k: v for k, v in tensors.items() if k != name}
        forged[name, "renamed"] = {**forged[name, "gone"], f"{name}x": tensors[name]}
        numbers = {n: make for n, (make, names) in VALUES.items() if own in names}
        if tensors[name].dtype == torch.int8:  # which knows no NaN
            numbers = {}
        for change, make in {**CHANGES, **numbers}.items():
            made = make(tensors[name]).contiguous()
            same = made.shape == tensors[name].shape and made.dtype == tensors[name].dtype
            free = own == "support" and change == "wider"  # its width follows the scores
            if not free and not (same and torch.equal(made, tensors[name])):
                forged[name, change] = tensors | {name: made}
    forged["another layer", ""] = tensors | {"layers.2.keys": tensors["layers.1.keys"].clone()}
    forged["no row", ""] = {name: tensor[:0].contiguous() for name, tensor in tensors.items()}
    assert len(forged) > 60
    for case, held in forged.items():
        save_file(held, tmp_path / "state", metadata)
        with pytest.raises(UsageError, match="damaged|was saved in") as error:
            models.load_state(tmp_path / "state", model)
            pytest.fail(f"loaded: {case}")
        assert error.value.hint
    save_file(tensors, tmp_path / "state", metadata)
    assert models.load_state(tmp_path / "state", model)[1] == [1]


def test_a_fingerprint_takes_in_large_tensors():
    """Of more than 2^24 numbers, as every public model's embedding, it was an IndexError."""
    large, model = torch.zeros(1 << 25, dtype=torch.bfloat16), torch.nn.Module()
    model.config = PreTrainedConfig()
    model.register_parameter("embedding", torch.nn.Parameter(large, requires_grad=False))
    before = fingerprint(model)
    large[-1] = 1
    assert fingerprint(model) != before


def test_bytes_that_flipped(saved, tmp_path):
    """Refused, or numbers that a state may hold: nothing else comes of it."""
    model, tensors, metadata = saved["log"]
    save_file(tensors, tmp_path / "whole", metadata)
    whole, rng = (tmp_path / "whole").read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    for number in range(300):
        made = bytearray(whole)
        for _ in range(rng.choice([1, 3])):
            made[rng.randrange(header if number % 3 else len(whole))] = rng.randrange(256)
        file = tmp_path / "flipped"
        file.write_bytes(made[: rng.choice([len(made), len(made), rng.randrange(len(made))])])
        try:
            cache, _ = models.load_state(file, model)
        except UsageError as error:
            assert error.hint
            continue
        with torch.no_grad():
            model(torch.tensor([[5]]), past_key_values=cache)
