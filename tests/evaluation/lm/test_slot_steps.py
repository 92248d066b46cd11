"""Answers decoded over slots that never move are those of growing caches."""

from contextlib import nullcontext

import pytest
import torch

from sparsek_cli.evaluation.lm.batching import join
from sparsek_cli.evaluation.lm.slot_steps import SlotSteps, in_slots
from sparsek_cli.evaluation.policies.registry import make_policy
from sparsek_cli.evaluation.policies.snapkv_h2o import observed_attention

STEPS, LENGTHS = 6, (150, 90, 201)
ON_GPU = pytest.param("cuda", marks=pytest.mark.gpu)


def caches(model, policy, prompts):
    found = []
    for ids in prompts:
        found.append(policy.new_cache(model))
        model(input_ids=ids, past_key_values=found[-1])
        policy.end_prompt(model, found[-1])
    return found


@pytest.mark.parametrize("device", ["cpu", ON_GPU])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", ["dense", "snapkv", "h2o:shared"])
def test_steps_over_slots_are_the_ones_over_growing_caches(checkpoints, name, rows, device):
    from transformers import AutoModelForCausalLM

    import sparsek_cli.models  # noqa: F401

    model = AutoModelForCausalLM.from_pretrained(checkpoints[1]).eval().to(device)
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 128, (1, n), generator=draw).to(device) for n in LENGTHS[:rows]]
    tokens = torch.randint(3, 128, (rows, STEPS), generator=draw).to(device)
    policy = make_policy(name)
    with policy.applied(model), torch.no_grad():
        alone = caches(model, policy, prompts)
        wanted = [
            torch.cat(
                [
                    model(
                        input_ids=tokens[i : i + 1, step : step + 1], past_key_values=cache
                    ).logits
                    for step in range(STEPS)
                ],
                dim=1,
            )
            for i, cache in enumerate(alone)
        ]
        pile = caches(model, policy, prompts)
        joined = join(pile) if rows > 1 else None
        cache = in_slots(model, pile[0] if joined is None else joined.cache, joined, STEPS)
        where = [(layer.keys.data_ptr(), layer.keys.shape) for layer in cache.layers]
        steps = SlotSteps(model, cache, cache.layers[0].after)
        with observed_attention(model) if name == "dense" else nullcontext():
            found = [steps.read(tokens[:, step]).clone() for step in range(STEPS)]
    assert where == [(layer.keys.data_ptr(), layer.keys.shape) for layer in cache.layers]
    assert (steps._graph is not None) == (device == "cuda")
    torch.testing.assert_close(torch.cat(found, dim=1), torch.cat(wanted), rtol=1e-4, atol=1e-4)


def test_a_dense_row_holds_what_it_has_read(checkpoints):
    from transformers import AutoModelForCausalLM

    import sparsek_cli.models  # noqa: F401
    from sparsek_cli.evaluation.lm.proof import held

    model = AutoModelForCausalLM.from_pretrained(checkpoints[1]).eval()
    policy = make_policy("dense")
    with policy.applied(model), torch.no_grad():
        pile = caches(model, policy, [torch.randint(3, 128, (1, n)) for n in LENGTHS])
        joined = join(pile)
        cache = in_slots(model, joined.cache, joined, 10)
    per_pair = 8 * 2 * 4
    for row, tokens in enumerate(LENGTHS):
        assert held(cache, row) == (4 * tokens, 4 * tokens * per_pair)


def test_caches_of_other_kinds_stay_as_they_are(checkpoints):
    from transformers import AutoModelForCausalLM, DynamicCache

    model = AutoModelForCausalLM.from_pretrained(checkpoints[0], attn_implementation="eager")
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.randint(3, 128, (1, 9)), past_key_values=cache)
    assert in_slots(model, cache, None, 4) is None


def test_families_whose_attention_nobody_has_tried_decode_over_growing_caches(dense_model):
    """Falcon's asks for no mask of ours: its answers failed."""
    from transformers import DynamicCache, FalconConfig, FalconForCausalLM

    sizes = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    for model, slots in (
        (FalconForCausalLM(FalconConfig(**sizes)), False),
        (dense_model("llama"), True),
    ):
        assert model.config._attn_implementation == "sdpa"
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model.eval()(input_ids=torch.tensor([[5, 6, 7]]), past_key_values=cache)
        assert (in_slots(model, cache, None, STEPS) is not None) == slots


def test_answers_are_the_same(recipe, console, tmp_path, monkeypatch):
    import json

    from verbs import evaluate

    from sparsek_cli.evaluation.lm import generation

    answers = []
    for graphed in (("cuda",), ("cpu",)):
        monkeypatch.setattr(generation, "GRAPHED", graphed)
        out = tmp_path / graphed[0]
        settings = {"tasks": ["recall_4"], "baselines": ["dense", "kvzip:shared"], "limit": 3}
        report = evaluate(recipe(**settings, batch_size=3, out=str(out)), console)
        files = sorted((out / "samples").rglob("*.jsonl"))
        responses = [[json.loads(r)["responses"] for r in f.open()] for f in files]
        proofs = [(u["proof"]["kv_pairs"], u["proof"]["kv_bytes"]) for u in report["units"]]
        answers.append((responses, proofs))
    assert answers[0] == answers[1]
