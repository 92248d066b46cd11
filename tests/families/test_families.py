"""What every row of the table must do; the page of families is made of these tests' names."""

from __future__ import annotations

import copy
import json
from contextlib import nullcontext

import pytest
import torch
from tiny_families import TINY

import sparsek_cli.models as models
from sparsek_cli.families import TABLE
from sparsek_cli.families.layers import has_states


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference over the largest value: families differ in the size of their logits."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


@torch.no_grad()
def logits(model, ids: torch.Tensor, **kwargs) -> torch.Tensor:
    return model(ids, use_cache=False, **kwargs).logits


def test_every_row_is_tested():
    assert set(TINY) == set(TABLE)


@torch.no_grad()
def test_equals_dense_when_nothing_is_dropped(made, ids):
    expected = logits(made.dense, ids)
    with models.budget(made.sparse, topk=ids.shape[1]):
        assert relative(logits(made.sparse, ids), expected) < 1e-5
        cached = made.sparse(ids, use_cache=True)
        assert isinstance(cached.past_key_values, models.SparseKCache)
        assert relative(cached.logits, expected) < 1e-5
    with models.dense_attention(made.sparse):
        assert relative(logits(made.sparse, ids), expected) < 1e-5
    assert relative(logits(made.sparse, ids), expected) > 1e-3


@torch.no_grad()
def test_decoding_and_chunks_equal_prefill(made, ids):
    whole = logits(made.sparse, ids)
    cache = models.SparseKCache(made.sparse.config)
    types = getattr(made.sparse.config, "layer_types", None)
    row, states = TABLE[made.family], has_states(types)
    parts = ids.split([9] + 31 * [1] if row.reads_once else [9, 1, 11, 1, 1, 17], dim=1)
    pieces = [made.sparse(part, past_key_values=cache).logits for part in parts]
    # transformers' own recurrent and parallel forms of a state differ by that much; other sums by
    # their order.
    assert relative(torch.cat(pieces, 1), whole) < (2e-4 if states else 3e-5)
    assert bool(cache.state_bytes) == states
    assert cache.get_seq_length() == ids.shape[1]
    bounded = models.sparsek_cache_bytes(made.sparse.config, torch.float32, 2)
    assert cache.nbytes - cache.state_bytes == bounded


@torch.no_grad()
def test_left_padding_has_no_influence(made, ids):
    batch, mask = ids.clone(), torch.ones_like(ids)
    batch[0, :9], mask[0, :9] = 0, 0
    alone = logits(made.sparse, ids[:1, 9:])
    for use_cache in (False, True):
        padded = made.sparse(
            batch, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=use_cache,
        ).logits  # fmt: skip
        assert relative(padded[:1, 9:], alone) < 1e-5


@torch.no_grad()
def test_packed_documents_do_not_see_each_other(made, ids):
    """As finetune packs them; models with states refuse such rows."""
    from sparsek_cli.errors import SparsekError

    places = torch.cat([torch.arange(9), torch.arange(ids.shape[1] - 9)])[None]
    if has_states(getattr(made.sparse.config, "layer_types", None)):
        with pytest.raises(SparsekError, match="states into the next"):
            logits(made.sparse, ids[:1], position_ids=places)
        return
    for attend in (nullcontext(), models.dense_attention(made.sparse)):
        with attend:
            alone = logits(made.sparse, ids[:1, 9:])
            packed = logits(made.sparse, ids[:1], position_ids=places)[:, 9:]
            assert relative(packed, alone) < 1e-5


def test_finetuning_reaches_every_scorer(made, ids):
    """Two steps of the trainer's own objective, whose loss is the model's."""
    from sparsek_cli.training.losses.objectives import Objective, attach, count_targets
    from sparsek_cli.training.losses.teacher import OwnTeacher

    model = copy.deepcopy(made.sparse)
    expected = model(ids, labels=ids, use_cache=False).loss.item()
    objective = Objective(lm=1.0, distill=1.0)
    attach(model, objective, OwnTeacher(model))
    roles = torch.ones_like(ids)
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-2)
    for step in range(2):
        sums = model.train()(ids, roles)["sums"]
        if step == 0:
            assert sums[0].item() / ids[:, 1:].numel() == pytest.approx(expected, rel=1e-4)
        assert sums[2] > 0  # further from its dense self than nothing
        optimiser.zero_grad()
        objective.combine(sums, count_targets(roles)).backward()
        for attention in models.sparsek_attentions(model):
            assert attention.scorer.weight.grad.abs().max() > 0
        optimiser.step()


def test_converts(made, converted, ids):
    """Everything went through the command line, which compared the logits with the base's."""
    from transformers import AutoModelForCausalLM

    out = converted.out
    # config.json is written without transformers: it says what the class would.
    config = json.loads((out / "config.json").read_text())
    wanted = models.sparsek_config_from(made.dense.config, config["sparsek"]).to_dict()
    for key in ("architectures", "auto_map", "sparsek", "model_type", "layer_types"):
        assert config.get(key) == wanted.get(key), key
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    few = ids[:, :16]  # the window sees all of them; the base is `dense`, as it was saved
    assert relative(logits(model, few), logits(made.dense, few)) < 1e-4


def test_calibrates(made, checkpoints):
    from safetensors.numpy import load_file

    scorers = load_file(checkpoints.out / "sparsek.safetensors")
    weights = [array for name, array in scorers.items() if name.endswith("scorer.weight")]
    assert len(weights) == len(models.sparsek_attentions(made.sparse))
    assert all(abs(array).sum() > 0 for array in weights)
    report = json.loads((checkpoints.out / "calibration.json").read_text())
    assert report["text_loss"] > 0 and report["window_text_loss"] > 0
    assert report["not_refined"] is None


@torch.no_grad()
def test_saves_and_reloads(made, ids, tmp_path):
    from transformers import AutoModelForCausalLM

    made.sparse.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(made.sparse) and again.config.sparsek == made.sparse.config.sparsek
    assert torch.equal(logits(again, ids), logits(made.sparse, ids))


@torch.no_grad()
def test_generates_what_prefill_says(made, ids):
    out = made.sparse.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
    said = logits(made.sparse, out)[:, ids.shape[1] - 1 : -1].argmax(-1)
    assert torch.equal(out[:, ids.shape[1] :], said)


def test_evaluates(checkpoints, cli, tmp_path):
    cli(
        "evaluate", checkpoints.out, "--output", tmp_path / "report", "--tasks", "ppl",
        "--limit", 1, "--lengths", 96, "--device", "cpu", "baselines=[dense]", "dtype=float32",
    )  # fmt: skip
    report = json.loads((tmp_path / "report" / "results.json").read_text())
    losses = {unit["policy"]: unit["metrics"]["ppl"]["value"] for unit in report["units"]}
    assert set(losses) == {"dense", "sparsek"} and losses["dense"] != losses["sparsek"]


def test_chats(checkpoints, tokenizer):
    from transformers import AutoModelForCausalLM

    from sparsek_cli.dialogue.drawing.sampling import Sampling
    from sparsek_cli.dialogue.engine import Engine
    from sparsek_cli.dialogue.session import Session

    model = AutoModelForCausalLM.from_pretrained(checkpoints.out).eval()
    session = Session(Engine(model, chunk=32), tokenizer, Sampling(max_new_tokens=3))
    for question in ("Who saw the garden?" * 4, "And then?"):
        "".join(session.ask(question))
    assert session.engine.fed > 60
