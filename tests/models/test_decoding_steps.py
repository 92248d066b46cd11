"""`bench generate` decodes what the model decodes, and freezes no more of a cache than it says."""

import copy

import torch

import sparsek_cli.models as models
from sparsek_cli.benchmarks.generate import Step, freeze, measure


@torch.no_grad()
def written(model, ids, cache, tokens):
    """Greedy tokens after `ids`, of which the cache holds all but the last."""
    step = Step(model, ids[:, -1:], ids.shape[1] - 1, cache)
    found = []
    for _ in range(tokens):
        step()
        found.append(int(step.word))
    return found


@torch.no_grad()
def test_steps_write_what_the_whole_model_writes(family, sparse_model):
    model = sparse_model(family, topk=4, window=4, sinks=1)
    ids = torch.randint(4, 128, (1, 20))
    for context in (models.budget(model), models.dense_attention(model)):
        with context:
            cache = model(ids[:, :-1], use_cache=True).past_key_values
            found = written(model, ids, cache, 4)
            expected = ids
            for _ in range(4):
                word = model(expected, use_cache=False).logits[:, -1:].argmax(-1)
                expected = torch.cat([expected, word], 1)
            assert found == expected[0, 20:].tolist()


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


def test_rows_of_both(sparse_model):
    model = sparse_model("llama", topk=4, window=4, sinks=1)
    (row,) = measure(model, [24], tokens=3, repeats=1, seed=0, say=print)
    assert row["ratio"] == row["sparsek_tokens_per_s"] / row["dense_tokens_per_s"]
    assert row["sparsek_prefill_s"] > 0 and row["missing"] == {} and not row["cuda_graphs"]
