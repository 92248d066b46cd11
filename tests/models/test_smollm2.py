"""A public model as the yardstick: SmolLM2-135M-Instruct, where SPARSEK_SMOLLM2 names its folder.

The variable names an ordinary folder of the dense model: config.json, safetensors and tokenizer.
Inputs are short: a minute on two cores.
"""

import json
import os
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        "SPARSEK_SMOLLM2" not in os.environ, reason="SPARSEK_SMOLLM2 names no folder"
    ),
]
TOPK, WINDOW, SINKS = 40, 20, 4
TEXT = "The capital of France is Paris. The capital of Italy is Rome. The capital of Spain is"


@pytest.fixture(scope="module")
def base() -> Path:
    """The dense checkpoint."""
    return Path(os.environ["SPARSEK_SMOLLM2"])


@pytest.fixture(scope="module")
def converted(base, tmp_path_factory) -> Path:
    """It, converted without calibration, to 64 slots."""
    import sparsek_cli as sparsek

    out = tmp_path_factory.mktemp("smollm2") / "out"
    sparsek.convert(base, out, topk=TOPK, window=WINDOW, sinks=SINKS, calibrate="none")
    return out


@pytest.fixture(scope="module")
def models(base, converted):
    """(tokenizer, dense, sparse), float32 on the CPU."""
    import sparsek_cli as sparsek

    dense, tokenizer = sparsek.load(base, device="cpu", dtype="float32")
    sparse, _ = sparsek.load(converted, device="cpu", dtype="float32")
    return tokenizer, dense, sparse


def test_geometry_and_files(converted):
    config = json.loads((converted / "config.json").read_text())
    assert config["model_type"] == "sparsek_llama" and config["num_hidden_layers"] == 30
    assert config["num_attention_heads"] == 9 and config["num_key_value_heads"] == 3
    assert config["sparsek"]["topk"] == TOPK and config["tie_word_embeddings"]


def test_ids_and_chat_template_are_the_bases(base, converted):
    from transformers import AutoTokenizer

    one, other = AutoTokenizer.from_pretrained(base), AutoTokenizer.from_pretrained(converted)
    turns = [{"role": "user", "content": "Why is 12345 odd?"}]
    assert one(TEXT).input_ids == other(TEXT).input_ids
    assert one.apply_chat_template(turns, tokenize=False) == other.apply_chat_template(
        turns, tokenize=False
    )


def test_where_nothing_is_dropped_logits_are_the_dense_ones(models):
    tokenizer, dense, sparse = models
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    assert ids.shape[1] <= TOPK
    with torch.inference_mode():
        expected, found = dense(ids).logits, sparse(ids).logits
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()
    assert "Madrid" in tokenizer.decode(found[0, -1].argmax())


def test_past_the_budget_the_cache_stops_and_decoding_is_prefill(models):
    tokenizer, _, sparse = models
    ids = tokenizer(TEXT * 6, return_tensors="pt").input_ids
    assert ids.shape[1] > TOPK + WINDOW + SINKS
    with torch.inference_mode():
        whole = sparse(ids).logits[:, -8:]
        output = sparse(ids[:, :-8], use_cache=True)
        cache, steps = output.past_key_values, []
        for at in range(ids.shape[1] - 8, ids.shape[1]):
            output = sparse(ids[:, at : at + 1], past_key_values=cache, use_cache=True)
            steps.append(output.logits)
    assert (torch.cat(steps, dim=1) - whole).abs().max() < 1e-3 * whole.abs().max()
    slots = 3 * (TOPK + WINDOW + SINKS)  # of all KV heads
    assert {layer.keys.shape for layer in cache.layers} == {(1, slots, 64)}
