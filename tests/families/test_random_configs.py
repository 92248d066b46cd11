"""The tool that draws random configs: what it draws, and that it finds a fault."""

from __future__ import annotations

import random

import pytest

import random_configs
import sparsek_cli.models as models


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "falcon_h1"])
def test_configs_are_drawn_and_compared(family):
    outcomes = []
    for number in range(3):
        rng = random.Random(number)
        settings = random_configs.draw(rng, family) | random_configs.shape(rng, family)
        outcomes.append(random_configs.check(family, settings, rng))
    assert "converted" in outcomes and not [x for x in outcomes if x.startswith("fault")], outcomes


@pytest.mark.parametrize("family", ["qwen2", "qwen2_moe", "qwen3", "smollm3"])
def test_families_in_which_some_layers_may_slide(family):
    """Qwen2-MoE says nothing of its window to attention functions: transformers' mask knows it."""
    kinds = ["sliding_attention", "full_attention"]
    settings = {"layer_types": kinds, "sliding_window": 5, "use_sliding_window": True}
    assert random_configs.check(family, settings, random.Random(0)) == "converted"


def test_one_seed_gives_one_config():
    draws = [random_configs.draw(random.Random(5), "llama") for _ in range(2)]
    assert draws[0] == draws[1]
    assert draws[0] != random_configs.draw(random.Random(6), "llama")


def test_a_fault_is_found(monkeypatch):
    """A model that drops pairs it should keep."""
    real = models.set_budget
    monkeypatch.setattr(
        "sparsek_cli.models.runtime.set_budget", lambda model, **changes: real(model, topk=1)
    )
    outcome = random_configs.check("llama", {}, random.Random(0))
    assert outcome == "fault: not dense where nothing is dropped"


def test_a_file_that_says_something_else_is_found(monkeypatch):
    """A config.json whose heads are not those of the classes."""
    monkeypatch.setattr(models, "head_dim", lambda config: 5)
    outcome = random_configs.check("llama", {}, random.Random(0))
    assert outcome.startswith("fault: config.json says Geometry(")


def test_states_are_held_to_what_their_dense_self_does():
    """A Nemotron-H whose single steps differ from reading, in float64 as well."""
    rng = random.Random("0-2191")
    settings = random_configs.draw(rng, "nemotron_h")
    before = rng.getstate()
    assert random_configs.check("nemotron_h", settings, rng) == "converted"
    rng.setstate(before)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(random_configs, "LIKE_DENSE", 0)
        outcome = random_configs.check("nemotron_h", settings, rng)
    assert outcome == "fault: decoding is not prefill"


def test_what_transformers_refuses_is_no_fault():
    outcome = random_configs.check("llama", {"hidden_act": "no such"}, random.Random(0))
    assert outcome.startswith("transformers: ")
    outcome = random_configs.check("mistral", {"sliding_window": 5}, random.Random(0))
    assert outcome.startswith("refused: every layer of the model uses a sliding window")
