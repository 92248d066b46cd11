"""Rotary positions that transformers chooses by the length of each text stand once for all here."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

import sparsek_cli as sparsek
import sparsek_cli.models as models
from sparsek_cli.conversion.plan import plan
from sparsek_cli.errors import UsageError
from sparsek_cli.families.varying_positions import chosen, in_words
from sparsek_cli.loading import load_weights
from sparsek_cli.models.positions import positions_for
from sparsek_cli.recipes.schema_convert import ConvertRecipe

ORIGINAL, OWN = 24, 96
LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": ORIGINAL,
    "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.5, 3.0, 6.0, 9.0],
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
KINDS = {
    "phi3": {
        "rope_parameters": LONG, "max_position_embeddings": OWN,
        "original_max_position_embeddings": ORIGINAL,
    },
    "llama": {"rope_parameters": DYNAMIC, "max_position_embeddings": ORIGINAL},
    "gemma3_text": {
        "rope_parameters": {"full_attention": LONG, "sliding_attention": DYNAMIC},
        "max_position_embeddings": OWN,
    },
}  # fmt: skip
LENGTHS = (ORIGINAL - 8, ORIGINAL + 36)


SAID = {
    "phi3": "long factors, also in texts up to 24 tokens (longrope)",
    "llama": "as in texts up to 24 tokens, never scaled (dynamic)",
    "gemma3_text": "long factors, also in texts up to 24 tokens (longrope); "
    "as in texts up to 96 tokens, never scaled (dynamic)",
}  # fmt: skip


def fields(kind):
    return copy.deepcopy(KINDS[kind])  # transformers writes into it


@torch.no_grad()
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_and_steps_are_one_pass(kind, length, sparse_model):
    """Keys of early pieces stood under factors for short texts, later ones under others."""
    model = sparse_model(kind, topk=4, window=4, sinks=1, **fields(kind))
    ids = torch.randint(4, 128, (2, length))
    whole = model(ids, use_cache=False).logits
    for pieces in ([7] * (length // 7), [length - 12]):
        cache, found = models.SparseKCache(model.config), []
        for part in ids.split([*pieces, *[1] * (length - sum(pieces))], dim=1):
            found.append(model(part, past_key_values=cache).logits)
        torch.testing.assert_close(torch.cat(found, dim=1), whole, atol=1e-5, rtol=1e-5)


def turned(model):
    """The frequencies of a model, after texts on both sides of the original length."""
    for length in reversed(LENGTHS):
        model(torch.randint(4, 128, (1, length)), use_cache=False)
    rotary = model.base_model.rotary_emb
    return {name: value.clone() for name, value in vars(rotary)["_buffers"].items()}


def assert_turned(model, wanted):
    found = turned(model)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_every_loader_gives_the_same(kind, sparse_model, dense_model, tokenizer, tmp_path):
    model = sparse_model(kind, **fields(kind))
    own = model.config.max_position_embeddings
    wanted = turned(model)
    # As transformers computes them where a text can be no other.
    always = chosen(fields(kind)["rope_parameters"], own)
    plain = dense_model(kind, **(fields(kind) | {"rope_parameters": always}))
    assert_turned(plain, wanted)
    model.save_pretrained(tmp_path / "sparse")
    base = dense_model(kind, **fields(kind))
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    if kind != "llama":
        assert any(not torch.equal(found, wanted[n]) for n, found in turned(base).items())
    for loaded in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "sparse"),
        AutoModel.from_pretrained(tmp_path / "sparse"),
        type(model).from_pretrained(tmp_path / "sparse"),
        AutoModelForCausalLM.from_config(model.config),
        copy.deepcopy(model),
        sparsek.load(tmp_path / "base", device="cpu"),  # which chat and evaluate read in pieces
        load_weights(tmp_path / "base", "base", dtype=torch.float32),  # by which it is calibrated
    ):
        assert_turned(loaded[0] if isinstance(loaded, tuple) else loaded, wanted)
    # Its logits are compared with the base's before it is there.
    sparsek.convert(tmp_path / "base", tmp_path / "out", topk=8, window=8, calibrate="none")
    assert_turned(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), wanted)
    asked = {"model": str(tmp_path / "base"), "out": str(tmp_path / "next"), "calibrate": "none"}
    planned = plan(ConvertRecipe(**asked))
    assert f"positions   {SAID[kind]}" in planned.text().splitlines()
    assert planned.data()["positions"] == SAID[kind]


@torch.no_grad()
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_for_a_length_they_are_transformers_own(kind, length, sparse_model, dense_model):
    dense = dense_model(kind, **fields(kind))
    model = sparse_model(kind, dense=dense)
    wanted = turned(model)
    ids = torch.randint(4, 128, (2, length))
    theirs = dense(ids, use_cache=False).logits
    with models.dense_attention(model), positions_for(model, length):
        torch.testing.assert_close(model(ids, use_cache=False).logits, theirs)
    assert_turned(model, wanted)


@pytest.mark.parametrize(
    ("rope", "own", "now", "words"),
    [
        (PLAIN, 96, PLAIN, None),
        (None, 96, None, None),
        (DYNAMIC | {"alpha": 1000.0}, 96, DYNAMIC | {"alpha": 1000.0}, None),  # Hunyuan's
        (DYNAMIC, 96, PLAIN, "as in texts up to 96 tokens, never scaled (dynamic)"),
        (LONG, 24, LONG | {"long_factor": LONG["short_factor"]}, "short factors (longrope)"),
        (LONG, 25, LONG | {"short_factor": LONG["long_factor"]}, SAID["phi3"]),
    ],
)
def test_the_models_own_length_decides(rope, own, now, words, dense_config):
    before = copy.deepcopy(rope)
    assert chosen(rope, own) == now and rope == before
    config = dense_config("llama", max_position_embeddings=own)
    config.rope_parameters = rope
    assert in_words(config) == words


@torch.no_grad()
def test_a_state_is_refused_under_other_factors(sparse_model, tmp_path):
    short = KINDS["phi3"] | {"max_position_embeddings": ORIGINAL}
    model, other = (sparse_model("phi3", **copy.deepcopy(own)) for own in (KINDS["phi3"], short))
    cache = models.SparseKCache(model.config)
    model(torch.randint(4, 128, (1, 20)), past_key_values=cache)
    models.save_state(cache, tmp_path / "state", model)
    models.load_state(tmp_path / "state", model)
    with pytest.raises(UsageError, match="rotary positions"):
        models.load_state(tmp_path / "state", other)
    with safe_open(tmp_path / "state", "pt") as opened:
        metadata = opened.metadata()
    del metadata["positions"]  # as earlier versions, which turned keys by each text's length
    save_file(load_file(tmp_path / "state"), tmp_path / "state", metadata)
    for one in (model, other):
        with pytest.raises(UsageError, match="by an earlier version of sparsek"):
            models.load_state(tmp_path / "state", one)
