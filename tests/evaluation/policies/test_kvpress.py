"""kvpress's presses as baselines: their scores choose, our bytes and window stay."""

import sys
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch

from sparsek_cli.errors import SparsekError, UsageError
from sparsek_cli.evaluation.policies.registry import check_names, make_policy


@dataclass
class ScorerPress:
    """What a press of kvpress is made of, as far as we use it."""

    compression_ratio: float = 0.0

    def post_init_from_model(self, model):
        pass

    def compress(self, *args):
        raise AssertionError("only scores are asked for")

    def forward_hook(self, *args):
        raise AssertionError("no hook of kvpress runs here")

    def __call__(self, model):
        raise AssertionError("no hook of kvpress runs here")


class InputPress(ScorerPress):
    """Prefers a feature of what comes in, and late pairs a little; checks what presses get."""

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        cos, sin = kwargs["position_embeddings"]
        assert attentions is None
        assert module.q_proj(hidden_states).shape[1] == keys.shape[2] == cos.shape[1]
        assert module.rotary_emb(hidden_states, torch.arange(3)[None])[0].shape[1] == 3
        assert kwargs["past_key_values"].layers[module.layer_idx].keys is keys
        return feature(hidden_states)[:, None].expand(-1, keys.shape[1], -1)


def feature(hidden_states):
    return hidden_states[..., 0] + 1e-3 * torch.arange(hidden_states.shape[1])


class HubPress(InputPress):
    def post_init_from_model(self, model):
        raise AssertionError("would download")


@dataclass
class WrapperPress(InputPress):
    press: object = None

    def compress(self, *args):
        raise AssertionError


class ShortPress(InputPress):
    def score(self, *args):
        raise AssertionError("prompts must be longer")


@pytest.fixture(autouse=True)
def kvpress(monkeypatch):
    """A stand-in for the package: the real one asks for an older transformers."""
    from sparsek_cli.evaluation.policies import kvpress

    module = ModuleType("kvpress")
    for kind in (ScorerPress, InputPress, HubPress, WrapperPress, ShortPress):
        setattr(module, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, "kvpress", module)
    kvpress.find.cache_clear()
    yield module
    kvpress.find.cache_clear()


@pytest.fixture
def model(checkpoints):
    from transformers import AutoModelForCausalLM

    import sparsek_cli.models  # noqa: F401

    return AutoModelForCausalLM.from_pretrained(checkpoints[1]).eval()


def ids(tokens, seed=3):
    return torch.randint(3, 128, (1, tokens), generator=torch.Generator().manual_seed(seed))


def read(model, policy, chunks):
    """The policy's cache after a prompt in `chunks`, ended."""
    with policy.applied(model), torch.no_grad():
        cache = policy.new_cache(model)
        for seed, size in enumerate(chunks):
            model(input_ids=ids(size, seed), past_key_values=cache)
        policy.end_prompt(model, cache)
    return cache


def test_pairs_held_are_those_with_the_best_scores(model):
    block = model.config.sparsek
    slots = block["sinks"] + block["topk"] + block["window"]
    policy, chunks = make_policy("kvpress:input"), (120, 100, 80)
    cache = read(model, policy, chunks)
    dense = read(model, make_policy("dense"), chunks)
    tokens = torch.cat([ids(size, seed) for seed, size in enumerate(chunks)], dim=1)
    with torch.no_grad():
        layer = model.model.layers[0]
        scores = feature(layer.input_layernorm(model.model.embed_tokens(tokens)))[0]
    older = 300 - block["window"]
    best = scores[:older].topk(slots - block["window"]).indices.sort().values
    kept = torch.cat([best, torch.arange(older, 300)])
    for held, whole in ((cache.layers[0].keys, dense.layers[0].keys),
                        (cache.layers[0].values, dense.layers[0].values)):  # fmt: skip
        torch.testing.assert_close(held, whole[:, :, kept])


def test_answers_keep_the_bytes(model):
    from sparsek_cli.evaluation.lm.proof import held

    policy = make_policy("kvpress:input")
    cache = read(model, policy, (300,))
    before = held(cache)
    assert before[0] == policy.most_pairs(model)
    with policy.applied(model), torch.no_grad():
        for token in range(30):
            model(input_ids=ids(1, token), past_key_values=cache)
    assert held(cache) == before
    assert cache.get_seq_length() == 330


def test_a_prompt_that_fits_loses_its_oldest_pairs_first(model):
    policy = make_policy("kvpress:short")  # which would refuse to score it
    cache = read(model, policy, (60,))
    with policy.applied(model), torch.no_grad():
        for token in range(12):
            model(input_ids=ids(1, token), past_key_values=cache)
    dense = read(model, make_policy("dense"), (60,))
    layer = cache.layers[0]
    order = layer.places[0, 0].argsort()
    assert layer.places[0, 0, order].tolist() == list(range(4, 72))
    held = layer.keys[:, :, order[:56]]
    torch.testing.assert_close(held, dense.layers[0].keys[:, :, 4:60])


def test_the_model_is_left_as_it_was(model):
    read(model, make_policy("kvpress:input"), (200,))
    attention = model.model.layers[0].self_attn
    assert not hasattr(attention, "rotary_emb")
    assert not attention._forward_pre_hooks


def test_a_run_names_it_and_says_when_it_chose(recipe, console, tmp_path):
    from verbs import evaluate

    from sparsek_cli.evaluation.report.table import text

    name = "kvpress:input"
    tasks = ["recall_4", "scrolls_contractnli"]
    settings = {"tasks": tasks, "baselines": ["dense", name], "budgets": [68, 2048], "limit": 2}
    report = evaluate(recipe(**settings), console)
    rows = {(u["task"], u["policy"]): u for u in report["units"]}
    assert rows["recall_4", f"{name}-68"]["proof"]["kv_pairs"] == 2 * 2 * 68
    for task in tasks:
        assert rows[task, f"{name}-2048"]["metrics"] == rows[task, "dense"]["metrics"]
    assert "read each prompt densely, question included" in text(report)
    assert (tmp_path / "out/samples/kvpress-input-68/recall_4@640.jsonl").is_file()


@pytest.mark.parametrize("name", ["kvpress:hub", "kvpress:wrapper", "kvpress:scorer"])
def test_presses_that_do_more_than_score_are_refused(name):
    with pytest.raises(UsageError, match="no press"):
        check_names([name])


def test_a_typo_gets_the_nearest_press():
    with pytest.raises(UsageError) as caught:
        check_names(["kvpress:inptu"])
    assert caught.value.hint == "did you mean 'kvpress:input'?"


def test_without_the_package_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "kvpress", None)
    with pytest.raises(UsageError, match="needs the package kvpress") as caught:
        check_names(["kvpress:knorm"])
    assert "pip install kvpress" in caught.value.hint


def test_a_press_that_refuses_is_an_error_of_one_line(model):
    with pytest.raises(SparsekError, match="ShortPress of kvpress: prompts must be longer"):
        read(model, make_policy("kvpress:short"), (300,))
