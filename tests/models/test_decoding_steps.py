"""`bench generate`: dense steps decode what the model decodes, and freeze no more than they say."""

import copy

import pytest
import torch

import sparsek_cli.models as models
from sparsek_cli.benchmarks import generate
from sparsek_cli.benchmarks.generate import Step, freeze, measure, split_keys, weight_bytes
from sparsek_cli.benchmarks.report import generate_header, generate_line
from sparsek_cli.models.attention.registration import replaced_attention
from sparsek_cli.models.config import DENSE_ATTENTION


@torch.no_grad()
def written(model, ids, cache, tokens):
    """Greedy tokens after `ids`, of which the cache holds all but the last."""
    step = Step(model, ids[:, -1:], ids.shape[1] - 1, cache)
    found = []
    for _ in range(tokens):
        step()
        found.append(step.word.clone())
    return torch.cat(found, dim=1)


@torch.no_grad()
def test_steps_write_what_the_whole_model_writes(family, sparse_model):
    model = sparse_model(family, topk=4, window=4, sinks=1)
    ids = torch.randint(4, 128, (2, 20))
    with models.dense_attention(model):
        cache = model(ids[:, :-1], use_cache=True).past_key_values
        found = written(model, ids, cache, 4)
        expected = ids
        for _ in range(4):
            word = model(expected, use_cache=False).logits[:, -1:].argmax(-1)
            expected = torch.cat([expected, word], 1)
        assert torch.equal(found, expected[:, 20:])


@torch.no_grad()
def test_a_frozen_cache_has_room_for_one_token_and_keeps_its_length(family, sparse_model):
    model = sparse_model(family, topk=4, window=4, sinks=1)
    ids = torch.randint(4, 128, (1, 20))
    with models.dense_attention(model):
        grown = model(ids[:, :-1], use_cache=True).past_key_values
        frozen = copy.deepcopy(grown)
        freeze(frozen)
        place = frozen.layers[0].keys.data_ptr()
        for token in (5, 7):  # the second takes the first one's place
            word = torch.full((1, 1), token)
            position = torch.full((1, 1), 19)
            out = model(word, position_ids=position, past_key_values=frozen).logits
            own = copy.deepcopy(grown)
            torch.testing.assert_close(model(word, past_key_values=own).logits, out)
        assert frozen.layers[0].keys.data_ptr() == place
        assert frozen.layers[0].keys.shape[-2] == 20 == own.layers[0].keys.shape[-2]


@pytest.mark.parametrize("batch", [1, 3])
def test_rows_of_both(sparse_model, batch):
    model = sparse_model("llama", topk=4, window=4, sinks=1)
    (row,) = measure(model, [24], batch=batch, tokens=3, repeats=1, seed=0, say=print)
    assert row["ratio"] == row["sparsek_tokens_per_s"] / row["dense_tokens_per_s"]
    assert row["sparsek_first_s"] > 0 and row["missing"] == {} and not row["cuda_graphs"]
    assert row["sparsek_cache_bytes"] == models.sparsek_cache_bytes(
        model.config, torch.float32, batch
    )
    assert row["dense_cache_bytes"] == models.dense_cache_bytes(
        model.config, 24, torch.float32, batch
    )
    share = row["dense_allowed_per_s"] / row["sparsek_allowed_per_s"]
    bytes_of = {name: weight_bytes(model) + row[f"{name}_cache_bytes"] for name in models_of(row)}
    assert share == pytest.approx(bytes_of["sparsek"] / bytes_of["dense"])
    assert row["split_ratio"] == row["sparsek_tokens_per_s"] / row["split_tokens_per_s"]
    assert len(generate_line(row).splitlines()) == 3 and "bytes allow" in generate_header()


@torch.no_grad()
def test_split_keys_are_dense_attention(family, sparse_model):
    model = sparse_model(family, topk=4, window=4, sinks=1)
    ids = torch.randint(4, 128, (2, 20))
    with models.dense_attention(model):
        cache = model(ids[:, :-1], use_cache=True).past_key_values
        expected = written(model, ids, copy.deepcopy(cache), 3)
        with replaced_attention(DENSE_ATTENTION, lambda _: split_keys(False)):
            assert torch.equal(written(model, ids, cache, 3), expected)


def test_a_rival_that_fails_is_named_and_the_row_stands(sparse_model, monkeypatch):
    def broken(compiled):
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setattr(generate, "split_keys", broken)
    model, said = sparse_model("llama", topk=4, window=4, sinks=1), []
    (row,) = measure(model, [24], batch=1, tokens=2, repeats=1, seed=0, say=said.append)
    assert row["missing"] == {"split": "RuntimeError: no kernel"} and row["ratio"] > 0
    assert "no kernel" in said[0] and "split_ratio" not in row
    assert len(generate_line(row).splitlines()) == 3


def test_a_rival_that_attends_to_something_else_has_no_rate(sparse_model, monkeypatch):
    def first_key_alone(compiled):
        def forward(module, query, key, value, attention_mask, **kwargs):
            out = value[:, :, :1].repeat_interleave(query.shape[1] // value.shape[1], dim=1)
            return out.transpose(1, 2).contiguous(), None

        return forward

    monkeypatch.setattr(generate, "split_keys", first_key_alone)
    model = sparse_model("llama", topk=4, window=4, sinks=1)
    (row,) = measure(model, [24], batch=2, tokens=2, repeats=1, seed=0, say=print)
    assert "from sdpa's" in row["missing"]["split"] and "split_tokens_per_s" not in row


def models_of(row):
    return {key.removesuffix("_first_s") for key in row if key.endswith("_first_s")}


def test_an_untied_embedding_is_not_read_by_a_step(sparse_model):
    untied = sparse_model("llama")
    tied = sparse_model("llama", tie_word_embeddings=True)
    assert weight_bytes(untied) == weight_bytes(tied)
