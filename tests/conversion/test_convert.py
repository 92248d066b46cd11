"""Converting checkpoints: what appears, what it shares with the base, and that the base is safe."""

from __future__ import annotations

import filecmp
import json
import math
import os
import re
from pathlib import Path

import pytest

from sparsek_cli import byte_units
from sparsek_cli.checkpoint_files.shards import read_shards
from sparsek_cli.console import Console
from sparsek_cli.conversion.card import model_card
from sparsek_cli.conversion.plan import plan as make_plan
from sparsek_cli.conversion.planned import Plan
from sparsek_cli.conversion.run import run as convert
from sparsek_cli.conversion.verify import relative_difference
from sparsek_cli.conversion.write import converted_config, neutral_scorers
from sparsek_cli.recipes.schema_convert import ConvertRecipe

QUIET = Console(quiet=True)


def plan_for(base: Path, out: Path, **settings) -> Plan:
    settings = {"calibrate": "none", "topk": 8, "window": 8, **settings}
    recipe = ConvertRecipe(model=str(base), out=str(out), **settings)
    return make_plan(recipe)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_family_converts_and_loads(family, dense_checkpoint, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    import sparsek_cli.models

    base = dense_checkpoint(family, max_shard_size="20KB")
    plan = plan_for(base, tmp_path / "out")
    done = convert(plan, QUIET)
    assert done.written.bytes_copied == 0
    assert done.verified.logits == "all layers" and done.verified.logit_difference < 1e-4
    model, info = AutoModelForCausalLM.from_pretrained(plan.out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(model) is sparsek_cli.models.FAMILIES[family].sparsek_causal_lm
    # Neutral scorers: scores 0 and a positive slope, whatever the class would have drawn.
    scorer = sparsek_cli.models.sparsek_attentions(model)[0].scorer
    assert not scorer.weight.any() and bool((scorer.slopes > 0).all())
    ids = torch.arange(3, 19)[None]
    dense = AutoModelForCausalLM.from_pretrained(base)
    assert torch.allclose(model(ids).logits, dense(ids).logits, atol=1e-4)


@pytest.mark.parametrize(("words", "held"), [({}, "float32"), ({"cache_dtype": "int8"}, "int8")])
def test_the_size_of_the_cache_is_said_with_its_number_format(
    dense_checkpoint, tmp_path, words, held
):
    plan = plan_for(dense_checkpoint(), tmp_path / "out", **words)
    kept = byte_units.size(plan.cache_bytes(plan.geometry.context, dense=False))
    assert f"cache       {kept} always, in {held}; dense at" in plan.text()
    assert f"{kept} in {held} for the whole\nmodel" in model_card(plan, None)


def test_rows_agree_with_the_model_classes(family, dense_config, dense_checkpoint, tmp_path):
    from transformers import AutoModelForCausalLM

    from sparsek_cli.models import FAMILIES, head_dim, kv_heads, sparsek_config_from

    base = dense_checkpoint(family)
    plan = plan_for(base, tmp_path / "out")
    config = dense_config(family)
    sizes = plan.geometry
    assert (sizes.layers, sizes.hidden) == (config.num_hidden_layers, config.hidden_size)
    assert (sizes.kv_heads, sizes.head_dim) == (kv_heads(config), head_dim(config))
    assert sizes.context == config.max_position_embeddings
    row = FAMILIES[family]
    assert plan.row.causal_lm == row.causal_lm.__name__
    base_model = AutoModelForCausalLM.from_pretrained(base).base_model
    norms = [name for name, _ in base_model.named_children() if "norm" in name or "ln" in name]
    assert norms == [plan.row.norm]
    # config.json is written without importing transformers: it must say what the class would.
    fields = converted_config(plan, neutral_scorers(plan))
    written = row.sparsek_config(**fields).to_dict()
    wanted = sparsek_config_from(config, fields["sparsek"]).to_dict()
    for key in ("architectures", "auto_map", "sparsek", "model_type", row.dropout):
        assert written[key] == wanted[key], key
    assert fields["auto_map"] == wanted["auto_map"]


@pytest.mark.parametrize(
    ("settings", "slots"),
    [
        ({}, (4, 188, 64)),  # a sixteenth of the context, 4096
        ({"budget": 40}, (4, 26, 10)),
        ({"budget": "1/4"}, (4, 892, 128)),
        ({"budget": "2/8", "window": 10, "sinks": 0}, (0, 1014, 10)),
    ],
)
def test_budget_splits_into_sinks_topk_and_window(dense_checkpoint, tmp_path, settings, slots):
    base = dense_checkpoint()
    plan = plan_for(base, tmp_path / "out", **{"topk": None, "window": None, **settings})
    assert (plan.sinks, plan.topk, plan.window) == slots
    # What is recorded makes the same again, and has one way to say it.
    again = ConvertRecipe(**{**plan.resolved(), "out": str(tmp_path / "again")})
    assert again.budget is None
    assert make_plan(again).budget == plan.budget


def test_base_is_linked_byte_for_byte(dense_checkpoint, tmp_path):
    base = dense_checkpoint(max_shard_size="20KB")
    shards = read_shards(base)
    assert len(shards) > 1
    plan = plan_for(base, tmp_path / "out")
    done = convert(plan, QUIET)
    for number, shard in enumerate(shards, start=1):
        linked = plan.out / f"base-{number:05}.safetensors"
        assert filecmp.cmp(linked, shard.path, shallow=False)
        if done.written.means[0] == "hard link":
            assert linked.samefile(shard.path)
    names = {path.name for path in plan.out.iterdir()}
    assert {"tokenizer.json", "README.md", "sparsek.yaml", "generation_config.json"} <= names
    index = json.loads((plan.out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {n for n in names if n.endswith(".safetensors")}


def test_commands_on_the_card_can_be_followed(dense_checkpoint, tmp_path, monkeypatch, capsys):
    from sparsek_cli.app import run as sparsek

    out = tmp_path / "out"
    convert(plan_for(dense_checkpoint(), out), QUIET)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").write_text("rain on the roof " * 400, encoding="utf-8")
    card = (out / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^sparsek (?!chat).*$", card, re.M)
    assert len(commands) == 2
    for line in commands:
        words = line.replace(" FILE", " file.txt").split()[1:]
        assert sparsek([*words, "--dry-run"]) == 0, capsys.readouterr().err


def test_copy_makes_files_of_its_own(dense_checkpoint, tmp_path):
    base = dense_checkpoint()
    plan = plan_for(base, tmp_path / "out", copy=True)
    done = convert(plan, QUIET)
    assert done.written.bytes_copied == plan.base_bytes
    copied = plan.out / "base-00001.safetensors"
    assert not copied.samefile(base / "model.safetensors")
    assert filecmp.cmp(copied, base / "model.safetensors", shallow=False)


def test_a_base_of_zeros_equals_its_conversion(dense_checkpoint, tmp_path):
    """0/0 failed the comparison, and asked for a report."""
    from safetensors.torch import load_file, save_file

    base = dense_checkpoint()
    zeros = {name: 0 * weight for name, weight in load_file(base / "model.safetensors").items()}
    save_file(zeros, base / "model.safetensors", metadata={"format": "pt"})
    recipe = ConvertRecipe(model=str(base), out=str(tmp_path / "out"), calibrate="none", topk=6)
    assert convert(make_plan(recipe)).verified.logit_difference == 0


def test_logits_that_differ_from_zeros_differ():
    """x/0 ended in a ZeroDivisionError; NaN passes nowhere."""
    import torch

    zeros = torch.zeros(2, 3)
    assert relative_difference(zeros, zeros) == 0
    assert relative_difference(zeros, zeros + 1) == math.inf
    assert relative_difference(zeros + 2, zeros + 1) == 0.5
    for dense in (zeros, zeros + 2):
        assert not relative_difference(dense, zeros + math.nan) <= 1


def test_links_go_through_symbolic_links_to_the_weights(dense_checkpoint, tmp_path):
    # The hub's cache holds symbolic links to blobs.
    base = dense_checkpoint()
    blob = tmp_path / "blob"
    (base / "model.safetensors").rename(blob)
    (base / "model.safetensors").symlink_to(blob)
    plan = plan_for(base, tmp_path / "out")
    convert(plan, QUIET)
    linked = plan.out / "base-00001.safetensors"
    assert not linked.is_symlink() and filecmp.cmp(linked, blob, shallow=False)


@pytest.mark.parametrize("shard_size", [None, "20KB"])
def test_saving_into_out_leaves_the_base_alone(dense_checkpoint, tmp_path, shard_size):
    import torch
    from transformers import AutoModelForCausalLM

    base = dense_checkpoint(max_shard_size="20KB")
    before = contents(base)
    plan = plan_for(base, tmp_path / "out")
    convert(plan, QUIET)
    model = AutoModelForCausalLM.from_pretrained(plan.out)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    model.save_pretrained(plan.out, **({"max_shard_size": shard_size} if shard_size else {}))
    assert contents(base) == before
    # And what was saved is what is loaded, not the links that are still there.
    again = AutoModelForCausalLM.from_pretrained(plan.out)
    for saved, loaded in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(saved, loaded)


def test_names_without_the_base_prefix(dense_model, tokenizer, tmp_path):
    """Old GPT-2 checkpoints name tensors `h.0...`; the scorers then follow that style."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    base = tmp_path / "base"
    model = dense_model("gpt2")
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    tensors = {
        name.removeprefix("transformer."): tensor.clone()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    plan = plan_for(base, tmp_path / "out")
    assert not plan.prefixed
    convert(plan, QUIET)
    _, info = AutoModelForCausalLM.from_pretrained(plan.out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


@pytest.mark.parametrize(("budget", "evicts"), [(127, True), (128, False), (10**6, False)])
def test_slots_for_the_whole_context_are_told(dense_checkpoint, tmp_path, budget, evicts):
    base = dense_checkpoint(max_position_embeddings=128)
    recipe = ConvertRecipe(
        model=str(base), out=str(tmp_path / "o"), calibrate="none", budget=budget
    )
    made = make_plan(recipe)
    said = "nothing is evicted within 128 tokens" in made.text()
    assert made.data()["evicts"] is evicts and said is not evicts


def test_dry_run_writes_nothing(dense_checkpoint, tmp_path, capsys, monkeypatch):
    from sparsek_cli.app import run

    base = dense_checkpoint()
    monkeypatch.chdir(tmp_path)
    before = sorted(os.listdir(tmp_path))
    assert run(["convert", str(base), "--calibrate", "none", "--dry-run", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["out"] == str(tmp_path / "base-sparsek")
    assert summary["slots_per_kv_head"] == 256 and summary["base_bytes_to_copy"] == 0
    assert sorted(os.listdir(tmp_path)) == before


def test_command_remembers_and_names_the_next(dense_checkpoint, tmp_path, capsys, monkeypatch):
    from sparsek_cli.app import run
    from sparsek_cli.commands import last_model

    monkeypatch.setenv("SPARSEK_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    base = dense_checkpoint()
    words = ["convert", str(base), "--calibrate", "none", "--topk", "8", "window=8"]
    assert run(words) == 0
    printed = capsys.readouterr()
    out = tmp_path / "base-sparsek"
    assert "0 base bytes copied" in printed.out
    assert f"sparsek chat {out}" in printed.err
    assert last_model.recall() == out
    # The recipe that lies beside the weights makes the same checkpoint again.
    again = tmp_path / "again"
    recipe = str(out / "sparsek.yaml")
    assert run(["convert", "--recipe", recipe, f"out={again}", "--overwrite"]) == 0
    assert contents(again)["sparsek.safetensors"] == contents(out)["sparsek.safetensors"]
    assert contents(again)["config.json"] == contents(out)["config.json"]


def test_overwrite_replaces_only_after_success(dense_checkpoint, tmp_path, monkeypatch):
    from sparsek_cli.conversion import run as module
    from sparsek_cli.errors import SparsekError

    base = dense_checkpoint()
    out = tmp_path / "out"
    convert(plan_for(base, out), QUIET)
    before = contents(out)
    plan = plan_for(base, out, overwrite=True, topk=9)

    def fail(*args):
        raise SparsekError("verification failed: made up")

    with monkeypatch.context() as patch:
        patch.setattr(module, "verify", fail)
        with pytest.raises(SparsekError):
            convert(plan, QUIET)
    assert contents(out) == before
    convert(plan, QUIET)
    assert json.loads((out / "config.json").read_text())["sparsek"]["topk"] == 9
    assert sorted(os.listdir(tmp_path)) == ["base", "out"]


def test_list_models_names_tiny_and_hub_models(capsys):
    from sparsek_cli.app import run

    assert run(["convert", "--list-models"]) == 0
    printed = capsys.readouterr().out
    assert "tiny" in printed and "llama-3.1-8b" in printed and "gated" in printed
