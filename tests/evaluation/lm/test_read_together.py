"""Prompts read side by side answer as prompts read one by one, from caches that hold the same."""

import json

import pytest
import torch
from verbs import evaluate

from sparsek_cli.evaluation.lm import generation, read_together, side_by_side
from sparsek_cli.evaluation.lm.proof import held
from sparsek_cli.evaluation.policies.registry import make_policy

LENGTHS = (201, 90, 150, 201)
ROWS = ["sparsek", "dense", "window", "random", "snapkv", "snapkv:shared"]


@pytest.fixture(scope="module")
def model(checkpoints):
    from transformers import AutoModelForCausalLM

    import sparsek_cli.models  # noqa: F401

    return AutoModelForCausalLM.from_pretrained(checkpoints[1]).eval()


def prompts(lengths=LENGTHS):
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(3, 128, (n,), generator=draw).tolist() for n in lengths]


@pytest.mark.parametrize("lengths", [LENGTHS, (150, 150), (1, 40)])
@pytest.mark.parametrize("name", ROWS)
def test_rows_are_as_if_they_had_been_read_alone(model, name, lengths):
    policy = make_policy(name)
    with policy.applied(model), torch.no_grad():
        found = side_by_side.read(model, prompts(lengths), lambda: policy.new_cache(model))
        for ids, (cache, logits) in zip(prompts(lengths), found, strict=True):
            alone = policy.new_cache(model)
            wanted = model(input_ids=torch.tensor([ids]), past_key_values=alone, use_cache=True)
            torch.testing.assert_close(logits, wanted.logits[:, -1:], rtol=1e-4, atol=1e-4)
            for one in (cache, alone):
                policy.end_prompt(model, one)
            assert cache.get_seq_length() == alone.get_seq_length() == len(ids)
            assert held(cache) == held(alone)
            after = [
                model(input_ids=torch.tensor([[7]]), past_key_values=one, use_cache=True).logits
                for one in (cache, alone)
            ]
            torch.testing.assert_close(*after, rtol=1e-4, atol=1e-4)


def test_caches_that_add_up_or_slide_are_read_alone(model):
    from transformers import DynamicCache, Gemma3TextConfig

    policy = make_policy("h2o")  # counts all queries, those of padding too
    with policy.applied(model):
        assert not side_by_side.can_split(policy.new_cache(model))
    sliding = Gemma3TextConfig(num_hidden_layers=2, layer_types=["sliding_attention"] * 2)
    assert not side_by_side.can_split(DynamicCache(config=sliding))
    assert not make_policy("sparsek:int8").reads_rows  # its prompts are read in pieces


def test_what_is_read_at_once_is_bounded():
    sequences = [[0] * n for n in (400, 90, 390, 10, 395, 1200, 380)]
    groups = side_by_side.batches(sequences, range(7), most=16, tokens=1000)
    assert groups == [[5], [0, 4], [2, 6], [1, 3]]
    one_by_one = side_by_side.batches(sequences, [0, 2, 4], most=1, tokens=1000)
    assert one_by_one == [[0], [4], [2]]
    far = [[0] * 900, [0] * (900 - side_by_side.SPREAD)]
    assert side_by_side.batches(far, [0, 1], most=16, tokens=10_000) == [[0], [1]]


def test_narrow_models_read_more_at_once():
    from transformers import GPT2Config, LlamaConfig

    wide = LlamaConfig(hidden_size=2048, intermediate_size=8192)
    narrow = LlamaConfig(hidden_size=576, intermediate_size=1536)
    assert side_by_side.tokens_at_once(wide) == 15 * 1024
    assert side_by_side.tokens_at_once(narrow) == 80 * 1024
    assert side_by_side.tokens_at_once(GPT2Config(n_embd=1024)) == 30 * 1024


def test_answers_and_proofs_are_those_of_prompts_read_one_by_one(
    recipe, console, tmp_path, monkeypatch
):
    """As on a GPU, where caches of shared beginnings are also joined."""
    settings = {"tasks": ["scrolls_qasper", "recall_4"], "baselines": ["dense", "snapkv", "random"]}
    seen, read = [], side_by_side.read
    monkeypatch.setattr(
        side_by_side, "read", lambda m, p, new: seen.append(len(p)) or read(m, p, new)
    )

    def run(name, **keys):
        out = tmp_path / name
        report = evaluate(recipe(**settings, out=str(out)), console, **keys)
        files = sorted((out / "samples").rglob("*.jsonl"))
        rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        kept = ("kv_tokens", "kv_pairs", "kv_bytes", "prompts")
        proofs = [{key: unit["proof"][key] for key in kept} for unit in report["units"]]
        return [t for row in rows for t in row["responses"] if isinstance(t, str)], proofs

    alone, shared = run("alone", share_prefix=False), run("shared")
    assert not seen
    for module in (generation, read_together):
        monkeypatch.setattr(module, "TOGETHER", ("cpu",))
    monkeypatch.setattr(generation.Answers, "_together", lambda self, size: 3)
    assert run("together", share_prefix=False) == alone
    assert seen and max(seen) > 1
    monkeypatch.setattr(read_together, "WORTH_SHARING", 0)
    assert run("shared-too") == shared


def test_without_memory_for_all_at_once_each_is_read_by_itself(
    recipe, console, tmp_path, monkeypatch
):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    settings = {"tasks": ["recall_4"], "baselines": ["window"]}
    alone = evaluate(recipe(**settings, out=str(tmp_path / "alone")), console)
    for module in (generation, read_together):
        monkeypatch.setattr(module, "TOGETHER", ("cpu",))
    monkeypatch.setattr(side_by_side, "read", full)
    found = evaluate(recipe(**settings, out=str(tmp_path / "full")), console)
    assert [u["metrics"] for u in found["units"]] == [u["metrics"] for u in alone["units"]]
