"""Sequences side by side: forks, joins, and rows that come and go write what each writes alone."""

import pytest
import torch

import sparsek_cli.models as models
from sparsek_cli.errors import SparsekError


@torch.no_grad()
def read(model, ids):
    """(cache, the token that follows) of ids [N]."""
    cache = models.SparseKCache(model.config)
    logits = model(ids[None], past_key_values=cache, logits_to_keep=1).logits
    return cache, int(logits[0, -1].argmax())


def alone(model, ids, count):
    options = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None}
    return model.generate(ids[None], **options)[0, len(ids) :].tolist()


def test_rows_come_and_go_without_touching_the_others(family, sparse_model):
    heads = 3 if family in ("gpt_neox", "gpt2") else [3, 5]
    model = sparse_model(family, topk=[heads, 4], window=4, sinks=1)
    for attention in models.sparsek_attentions(model):
        # The same token twice ties in the first layer, and a batch rounds unlike a row alone.
        attention.scorer.slopes.data.fill_(1e-3)
    texts = [torch.randint(4, 128, (length,)) for length in (30, 9, 17, 5)]
    expected = [alone(model, ids, 12) for ids in texts]
    batch = models.DecodingBatch(model, 2)
    rows, written = {}, {}

    def enter(which):
        cache, word = read(model, texts[which])
        rows[which], written[which] = batch.join(cache, word), [word]

    def step(count):
        found = batch.step(count)
        assert sorted(found) == sorted(rows.values())
        for which, row in rows.items():
            written[which] += found[row]

    enter(0)
    step(3)
    enter(1)
    step(2)
    assert batch.free == 0
    left = batch.leave(rows.pop(0))
    enter(2)
    step(4)
    batch.leave(rows.pop(1))
    step(3)
    enter(3)
    step(2)
    for which, tokens in written.items():
        assert tokens == expected[which][: len(tokens)] and len(tokens) > 2
    # What left goes on alone.
    assert left.get_seq_length() == 35
    text = torch.cat([texts[0], torch.tensor(written[0])])
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    more = model.generate(text[None], past_key_values=left, **options)
    assert more[0, 36:].tolist() == expected[0][6:9]


def test_a_batch_refuses_what_does_not_fit(sparse_model):
    model = sparse_model("llama", topk=3, window=4, sinks=1)
    batch = models.DecodingBatch(model, 1)
    assert batch.step() == {}
    cache, word = read(model, torch.arange(4, 12))
    with pytest.raises(SparsekError, match="0 sequences"):
        batch.join(models.SparseKCache(model.config), word)
    with pytest.raises(SparsekError, match="2 sequences"):
        batch.join(models.fork(cache, 2), word)
    row = batch.join(cache, word)
    with pytest.raises(SparsekError, match="taken"):
        batch.join(cache, word)
    batch.leave(row)
    with pytest.raises(SparsekError, match="not taken"):
        batch.leave(row)


def test_many_questions_of_a_document_that_was_read_once(sparse_model):
    model = sparse_model("llama", topk=3, window=4, sinks=1)
    document = torch.randint(4, 128, (40,))
    questions = torch.randint(4, 128, (3, 6))
    cache, _ = read(model, document)
    whole = torch.cat([document.expand(3, -1), questions], dim=1)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    expected = model.generate(whole, **options)
    together = model.generate(whole, past_key_values=models.fork(cache, 3), **options)
    assert torch.equal(together, expected)
    for row in range(3):
        one = model.generate(whole[row : row + 1], past_key_values=models.fork(cache), **options)
        assert torch.equal(one[0], expected[row])
    assert cache.get_seq_length() == 40


def test_joined_rows_go_on_at_their_own_positions(sparse_model):
    model = sparse_model("qwen3", topk=3, window=4, sinks=1)
    texts = [torch.randint(4, 128, (length,)) for length in (30, 9)]
    read_ones = [read(model, ids) for ids in texts]
    cache = models.join([cache for cache, _ in read_ones])
    words = torch.tensor([[word] for _, word in read_ones])
    mask = torch.ones(2, 31, dtype=torch.long)
    mask[1, :21] = 0  # the second row has read 9
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    out = model.generate(words, past_key_values=cache, attention_mask=mask, **options)
    for row, ids in enumerate(texts):
        assert out[row].tolist() == alone(model, ids, 5)
    with pytest.raises(SparsekError, match="empty"):
        models.join([cache, models.SparseKCache(model.config)])
    with models.budget(model, topk=2), pytest.raises(SparsekError, match="different budgets"):
        models.join([cache, read(model, texts[0])[0]])
