"""generate() and the cache behind it."""

import copy

import pytest
import torch
from transformers import DynamicCache

import sparsek_cli as sparsek
import sparsek_cli.models as models
from sparsek_cli.errors import SparsekError


@pytest.fixture
def ids():
    return torch.randint(4, 128, (2, 14))


@torch.no_grad()
def test_greedy_equals_an_argmax_loop(family, sparse_model, ids):
    model = sparse_model(family)
    text = ids
    for _ in range(8):
        text = torch.cat([text, model(text, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    out = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert torch.equal(out, text)


@torch.no_grad()
@pytest.mark.parametrize("short", [12, 18])  # the prompt is longer, or the text becomes so
def test_phi_3_keeps_its_cache_where_long_rotary_factors_begin(short, sparse_model, ids):
    """It took the cache away, and a prompt that long ended in an error about sequences."""
    model = sparse_model("phi3", original_max_position_embeddings=short)
    text = ids
    for _ in range(8):
        text = torch.cat([text, model(text, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    for options in ({}, {"num_beams": 2}):
        out = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, **options)
        assert out.shape == text.shape and (options or torch.equal(out, text))


LEARNED = {"gpt2": "n_positions", "opt": "max_position_embeddings", "biogpt": None}


def padded(ids, count):
    """`count` columns of padding before the tokens, and the mask that says so."""
    nothing = torch.zeros(ids.shape[0], count, dtype=torch.int64)
    mask = torch.cat([nothing, torch.ones_like(ids)], dim=1)
    return {"input_ids": torch.cat([nothing, ids], dim=1), "attention_mask": mask}


@torch.no_grad()
@pytest.mark.parametrize("family", LEARNED)
def test_a_text_ends_where_learned_positions_do(family, sparse_model, ids):
    """It was an IndexError of torch, and on a GPU the end of the process."""
    key = LEARNED[family] or "max_position_embeddings"
    model = sparse_model(family, **{key: 32})
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    said = f"this {family} has learned positions for 32 tokens only"

    def room(words, wanted, **more):
        """A text that ends with the table, its last token behind it, is written; no longer one."""
        whole = model.generate(**words, max_new_tokens=wanted, **options, **more)
        with pytest.raises(SparsekError, match=said) as refusal:
            model.generate(**words, max_new_tokens=wanted + 1, **options, **more)
        assert "prompt and max_new_tokens together within 32" in refusal.value.hint
        return whole

    written = room({"input_ids": ids}, 19)
    kept = model.generate(ids, max_new_tokens=18, **options)  # as hinted: 14 and 18
    assert torch.equal(kept, written[:, :32]) and written.shape == (2, 33)
    room({"input_ids": ids}, 19, num_beams=2)  # by transformers' loop
    room({"inputs_embeds": model.get_input_embeddings()(ids)}, 19)
    room(padded(ids, 30), 19)  # columns that stand nowhere
    with models.dense_attention(model):
        room({"input_ids": ids}, 19)
    # Who may stop earlier is not refused for what could have come.
    ends = options | {"eos_token_id": list(range(128)), "max_new_tokens": 60}
    assert model.generate(ids, **ends).shape == (2, 15)


@torch.no_grad()
@pytest.mark.parametrize("family", LEARNED)
def test_a_dense_model_ends_there_too(family, make_checkpoint, tmp_path, ids):
    """It was an IndexError, though what is converted of it says why."""
    key = LEARNED[family] or "max_position_embeddings"
    model, _ = sparsek.load(make_checkpoint(tmp_path, family, **{key: 32}), device="cpu")
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for words in ({"input_ids": ids}, padded(ids, 30)):
        end = words["input_ids"].shape[1] + 19
        assert model.generate(**words, max_new_tokens=19, **options).shape == (2, end)
        for attempt in (copy.deepcopy(model), model):
            with pytest.raises(SparsekError, match=f"this {family} has learned positions for 32"):
                attempt.generate(**words, max_new_tokens=20, **options)
    with pytest.raises(SparsekError, match="the text has 33 tokens"):
        model.base_model(torch.zeros(1, 33, dtype=torch.int64))


@torch.no_grad()
@pytest.mark.parametrize("family", LEARNED)
def test_reading_and_stepping_beyond_learned_positions(family, sparse_model):
    key = LEARNED[family] or "max_position_embeddings"
    model = sparse_model(family, **{key: 32})
    text, said = torch.randint(4, 128, (1, 33)), "learned positions for 32 tokens"
    cache = models.SparseKCache(model.config)
    model(text[:, :30], past_key_values=cache)
    for attempt in (
        lambda: model(text),
        lambda: model.base_model(text),
        lambda: model(text[:, 30:], past_key_values=models.fork(cache)),
        lambda: model(text[:, :1], position_ids=torch.tensor([[32]])),
    ):
        with pytest.raises(SparsekError, match=said):
            attempt()
    assert model(text[:, :32]).logits.shape[1] == 32
    if family == "opt":  # which counts what its mask shows
        assert model(**padded(text[:, :32], 4)).logits.shape[1] == 36
    batch = models.DecodingBatch(model, rows=2)
    row = batch.join(cache, 7)
    with pytest.raises(SparsekError, match=said):
        batch.step(3)
    alone = model.generate(
        torch.cat([text[:, :30], torch.tensor([[7]])], 1), max_new_tokens=2, do_sample=False,
        eos_token_id=None,
    )  # fmt: skip
    assert batch.step(2)[row] == alone[0, 31:].tolist()  # nothing was written before
    with pytest.raises(SparsekError, match=said):
        batch.step()


@torch.no_grad()
def test_left_padded_batch_equals_rows_alone(family, sparse_model):
    model = sparse_model(family)
    rows = [torch.randint(4, 128, (length,)) for length in (15, 6, 11)]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    batch = torch.zeros(3, 15, dtype=torch.long)
    mask = torch.zeros(3, 15, dtype=torch.long)
    for row, tokens in enumerate(rows):
        batch[row, -len(tokens) :], mask[row, -len(tokens) :] = tokens, 1
    out = model.generate(batch, attention_mask=mask, **options)
    for row, tokens in enumerate(rows):
        alone = model.generate(tokens[None], **options)[0, len(tokens) :]
        assert torch.equal(out[row, 15:], alone)


@torch.no_grad()
def test_beams_equal_beams_without_cache(family, sparse_model, ids):
    model = sparse_model(family)
    options = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    cached = model.generate(ids, num_return_sequences=2, **options)
    plain = model.generate(ids, num_return_sequences=2, use_cache=False, **options)
    assert torch.equal(cached, plain)


@torch.no_grad()
def test_sampling_runs_and_is_seeded(sparse_model, ids):
    model = sparse_model("llama")
    options = {"do_sample": True, "max_new_tokens": 5, "num_return_sequences": 3}
    torch.manual_seed(1)
    first = model.generate(ids, **options)
    torch.manual_seed(1)
    assert torch.equal(model.generate(ids, **options), first)
    assert first.shape[0] == 6


@torch.no_grad()
def test_a_cache_carries_over_turns(family, sparse_model, ids):
    model = sparse_model(family)
    options = {"do_sample": False, "eos_token_id": None}
    cache = models.SparseKCache(model.config)
    first = model.generate(ids, past_key_values=cache, max_new_tokens=3, **options)
    text = torch.cat([first, torch.randint(4, 128, (2, 5))], dim=1)
    second = model.generate(text, past_key_values=cache, max_new_tokens=3, **options)
    assert torch.equal(second, model.generate(text, max_new_tokens=3, **options))
    returned = model.generate(
        ids, max_new_tokens=3, return_dict_in_generate=True, **options
    ).past_key_values
    assert isinstance(returned, models.SparseKCache)


@torch.no_grad()
def test_chunked_prefill_and_embeddings_give_the_same_text(family, sparse_model, ids):
    model = sparse_model(family)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, prefill_chunk_size=5, **options), expected)
    embedded = model.generate(inputs_embeds=model.get_input_embeddings()(ids), **options)
    assert torch.equal(embedded, expected[:, 14:])


@torch.inference_mode()
def test_cache_bytes_at_64k_are_those_at_4k(sparse_model):
    model = sparse_model("llama", topk=24, window=32, max_position_embeddings=65536)
    cache = models.SparseKCache(model.config)
    sizes = []
    for _ in range(16):
        chunk = torch.randint(4, 128, (1, 4096))
        model(chunk, past_key_values=cache, logits_to_keep=1)
        sizes.append(cache.nbytes)
    assert cache.get_seq_length() == 65536
    assert set(sizes) == {models.sparsek_cache_bytes(model.config, torch.float32)}


@torch.no_grad()
def test_cache_bytes_are_constant_and_known(sparse_model):
    model = sparse_model("llama", topk=[[5, 0], 2], window=6, sinks=2)
    cache = models.SparseKCache(model.config)
    assert cache.nbytes == 0
    sizes = []
    for tokens in (1, 3, 40, 200):
        model(torch.randint(4, 128, (2, tokens)), past_key_values=cache)
        sizes.append(cache.nbytes)
    assert len(set(sizes)) == 1
    # 2 rows * slots * (K and V of 8 floats, an int32 position, a float64 score) + an int64 count.
    slots = [5 + 0 + 2 * 8, 2 * 2 + 2 * 8]
    formula = sum(2 * (count * (2 * 8 * 4 + 4 + 8) + 8) for count in slots)
    assert sizes[0] == formula == models.sparsek_cache_bytes(model.config, torch.float32, batch=2)
    # Dense: 2 (K and V) * 2 rows * 2 layers * 2 heads * 244 tokens * 8 * 4 bytes.
    dense = models.dense_cache_bytes(model.config, 244, torch.float32, batch=2)
    assert dense == 2 * 2 * 2 * 2 * 244 * 8 * 4
    with models.dense_attention(model):
        held = model(torch.randint(4, 128, (2, 244)), use_cache=True).past_key_values
    assert sum(layer.keys.nbytes + layer.values.nbytes for layer in held.layers) == dense


@torch.no_grad()
def test_cache_row_operations(sparse_model, ids):
    model = sparse_model("qwen3")
    more = torch.randint(4, 128, (2, 4))
    cache = models.SparseKCache(model.config)
    model(ids, past_key_values=cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    swapped = model(more, past_key_values=cache).logits
    whole = model(torch.cat([ids.flip(0), more], dim=1), use_cache=False).logits[:, -4:]
    torch.testing.assert_close(swapped, whole, atol=1e-5, rtol=1e-5)

    cache.reset()
    assert cache.get_seq_length() == 0 and cache.nbytes == 0
    model(ids, past_key_values=cache)
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 4
    cache.batch_select_indices(torch.tensor([0, 3]))
    again = model(more, past_key_values=cache).logits
    whole = model(torch.cat([ids, more], dim=1), use_cache=False).logits[:, -4:]
    torch.testing.assert_close(again, whole, atol=1e-5, rtol=1e-5)
    assert cache.get_seq_length() == 18
    assert sum(cache.get_mask_sizes(1, 0)) == 19


def test_what_cannot_work_is_refused(sparse_model, ids):
    model = sparse_model("llama")
    cache = models.SparseKCache(model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    with pytest.raises(SparsekError, match="cropped"):
        cache.crop(-1)
    with pytest.raises(SparsekError, match="2 sequences"):
        model(ids[:1], past_key_values=cache)
    with pytest.raises(SparsekError, match="DynamicCache"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(SparsekError, match="DynamicCache"):
        model.generate(ids, past_key_values=DynamicCache(), max_new_tokens=2)
    with pytest.raises(SparsekError, match="assisted generation takes"):
        model.generate(ids[:1], assistant_model=sparse_model("llama"), max_new_tokens=2)
    with pytest.raises(SparsekError, match="assisted generation takes"):
        model.generate(ids[:1], prompt_lookup_num_tokens=2, max_new_tokens=2)
    with pytest.raises(SparsekError, match="cache_implementation"):
        model.generate(ids, cache_implementation="static", max_new_tokens=2)
    with pytest.raises(SparsekError, match="assisting another model takes"):
        other = sparse_model("llama")
        model.set_attn_implementation("sparsek_dense")
        model.generate(ids[:1], assistant_model=other, max_new_tokens=2)


@torch.no_grad()
def test_a_cache_that_the_base_s_own_settings_ask_for_is_not_made(sparse_model, ids, tmp_path):
    """A generation_config.json comes along from the base; every call failed, and named a flag."""
    model = sparse_model("llama")
    settings = {"max_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True}
    expected = model.generate(ids, **settings).sequences
    model.generation_config.cache_implementation = "static"
    model.save_pretrained(tmp_path)
    assert "static" in (tmp_path / "generation_config.json").read_text()
    found = type(model).from_pretrained(tmp_path).generate(ids, **settings)
    assert type(found.past_key_values) is models.SparseKCache
    assert found.sequences.equal(expected)


@torch.no_grad()
def test_training_makes_no_cache_unless_asked(sparse_model, ids):
    model = sparse_model("llama").train()
    assert model(ids).past_key_values is None
    assert model(ids, use_cache=True).past_key_values is not None
    model.eval()
    positions = torch.arange(14) % 7
    assert model(ids, position_ids=positions[None]).past_key_values is None


@torch.no_grad()
def test_the_base_model_alone_brings_its_cache(family, sparse_model, ids):
    base = sparse_model(family).base_model
    out = base(ids)
    assert isinstance(out.past_key_values, models.SparseKCache)
    assert out.last_hidden_state.shape == (2, 14, 32)


@pytest.mark.parametrize("beams", [1, 2])
def test_stop_strings_end_the_text(beams, sparse_model, ids, tokenizer):
    """transformers hands their tokenizer on to the model, and its server always gives one."""
    model = sparse_model("llama")
    options = {"do_sample": False, "num_beams": beams, "eos_token_id": None, "max_new_tokens": 8}
    written = model.generate(ids[:1], **options)[0, 14:].tolist()
    stop = tokenizer.decode(written[2])
    out = model.generate(ids[:1], stop_strings=[stop], tokenizer=tokenizer, **options)
    assert stop in tokenizer.decode(out[0, 14:]) and out.shape[1] <= 14 + 8
    assert out[0, 14:].tolist() == written[: out.shape[1] - 14]
    if beams == 1:
        assert out.shape[1] < 14 + 8, "it did not stop"
