"""What generation_config.json asks of tokens counts in chat as in transformers' `generate`."""

import pytest
import torch
from transformers import GenerationConfig

from sparsek_cli.dialogue.drawing.own_settings import in_words
from sparsek_cli.dialogue.drawing.sampling import Sampling
from sparsek_cli.dialogue.engine import Engine
from sparsek_cli.errors import UsageError

PROMPT = list(range(3, 23))
COUNT = 12


@pytest.fixture(scope="module")
def model(make_sparse):
    """Sharp, so that it repeats itself."""
    model = make_sparse("llama", topk=30, window=30)
    with torch.no_grad():
        model.lm_head.weight.mul_(40)
    return model


def written(model, sampling=None, stops=()):
    engine = Engine(model)
    engine.feed(PROMPT)
    chosen = sampling or Sampling(max_new_tokens=COUNT)
    return [*engine.stream(chosen, frozenset(stops))]


def generated(model, **asked):
    ids = torch.tensor([PROMPT])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=COUNT, pad_token_id=0,
        eos_token_id=None, **asked,
    )  # fmt: skip
    return out[0, len(PROMPT) :].tolist()


ASKED = [
    {"repetition_penalty": 1.7},
    {"no_repeat_ngram_size": 1},
    {"bad_words_ids": [[96], [123, 78]]},
    {"suppress_tokens": [*range(60)]},
    {"begin_suppress_tokens": [96]},
    {"sequence_bias": [[[70], 100.0]]},
    {"forced_eos_token_id": 2},
]


@pytest.mark.parametrize("asked", ASKED, ids=lambda asked: next(iter(asked)))
def test_replies_are_those_of_generate(asked, model, monkeypatch):
    """They were those of a model that had no such settings."""
    monkeypatch.setattr(model, "generation_config", GenerationConfig())
    plain = written(model)
    assert plain == generated(model)
    monkeypatch.setattr(model, "generation_config", GenerationConfig(**asked))
    assert written(model) == generated(model) != plain
    assert next(iter(asked)) in in_words(model)


def test_an_end_waits_for_the_least_number_of_tokens(model, monkeypatch):
    monkeypatch.setattr(model, "generation_config", GenerationConfig())
    plain = written(model)
    stops = {plain[1]}
    assert len(written(model, stops=stops)) < 3
    monkeypatch.setattr(model, "generation_config", GenerationConfig(min_new_tokens=6))
    assert len(written(model, stops=stops)) >= 6


def test_cut_offs_count_where_a_temperature_draws(model, monkeypatch):
    drawn = Sampling(temperature=50.0, max_new_tokens=COUNT)
    likeliest = written(model)
    assert written(model, drawn) != likeliest
    monkeypatch.setattr(model, "generation_config", GenerationConfig(top_k=1))
    assert written(model, drawn) == likeliest
    assert in_words(model) == "top_k 1 counts where a temperature draws"


def test_how_tokens_are_drawn_is_said_by_chat_s_own_settings(model, monkeypatch):
    asked = dict(do_sample=True, temperature=9.0, top_p=0.5, top_k=0)
    monkeypatch.setattr(model, "generation_config", GenerationConfig())
    plain = written(model), written(model, Sampling(0.7, 0.9, COUNT, 3))
    monkeypatch.setattr(model, "generation_config", GenerationConfig(**asked))
    assert (written(model), written(model, Sampling(0.7, 0.9, COUNT, 3))) == plain
    assert in_words(model) == ""
    # Where it asks for something else, too, the same numbers count.
    asked["repetition_penalty"] = 1.7
    monkeypatch.setattr(model, "generation_config", GenerationConfig(**asked))
    assert written(model, Sampling(0.0, 0.9, COUNT)) == generated(model, do_sample=False)
    assert written(model, Sampling(1e-4, 0.9, COUNT)) == written(model)


def test_what_is_not_heeded_is_said(model, monkeypatch):
    asked = GenerationConfig(num_beams=4, guidance_scale=1.5, repetition_penalty=1.0)
    monkeypatch.setattr(model, "generation_config", asked)
    assert in_words(model) == "num_beams, guidance_scale is not heeded"
    assert written(model) == written(model)


@pytest.mark.parametrize(
    "asked", [{"repetition_penalty": -2.0}, {"exponential_decay_length_penalty": [1]}]
)
def test_what_cannot_be_is_refused_in_one_line(asked, model, monkeypatch):
    monkeypatch.setattr(model, "generation_config", GenerationConfig(**asked))
    for ask in (written, in_words):
        with pytest.raises(UsageError, match="generation_config.json asks for") as error:
            ask(model)
        assert "remove it" in error.value.hint


def test_a_ban_of_what_is_no_token_is_refused_in_one_line(model, monkeypatch):
    """transformers finds it with the first logits; it was told as an error of ours."""
    asked = GenerationConfig(bad_words_ids=[[99_999]])
    monkeypatch.setattr(model, "generation_config", asked)
    with pytest.raises(UsageError, match="generation_config.json asks for") as error:
        written(model)
    assert "remove it" in error.value.hint


def test_tokens_of_the_conversation_are_listed_only_where_something_is_shaped(model, monkeypatch):
    """Of a million tokens such a list takes more memory than the cache."""
    listed = []
    said = Engine.said
    monkeypatch.setattr(Engine, "said", lambda engine: listed.append(1) or said(engine))
    written(model)
    assert not listed
    monkeypatch.setattr(model, "generation_config", GenerationConfig(repetition_penalty=1.7))
    written(model)
    assert listed
