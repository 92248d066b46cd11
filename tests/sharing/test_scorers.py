"""Scorers alone: megabytes that go onto the base they were made for, and onto no other."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

import sparsek_cli as sparsek
from sparsek_cli.errors import SparsekError, UsageError
from sparsek_cli.output import scorers_file
from sparsek_cli.scorers_alone.find import read
from sparsek_cli.sharing import push

IDS = torch.arange(3, 60)[None]
# What differs in names and shapes: a prefix in files, fused maps, layers of other kinds.
KINDS = ("gpt2", "gemma3_text", "nemotron_h")


def logits(folder) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder)(IDS, use_cache=False).logits


def test_a_base_and_its_scorers_are_the_converted_model(scored, tmp_path):
    base, out, scorers = scored
    alone = load_file(scorers / "sparsek.safetensors")
    assert {array.dtype.name for array in alone.values()} == {"float32"}
    own = load_file(out / "sparsek.safetensors")
    assert sum(a.nbytes for a in alone.values()) == sum(a.nbytes for a in own.values())
    done = sparsek.merge(base, scorers, tmp_path / "merged")
    assert "copy" not in done.converted.written.means
    assert torch.equal(logits(done.out), logits(out))
    made, merged = (json.loads((Path(x) / "config.json").read_text()) for x in (out, done.out))
    assert made == merged
    assert "put onto" in (tmp_path / "merged/README.md").read_text()
    recipe = (tmp_path / "merged/sparsek.yaml").read_text()
    assert "model: base\n" in recipe and str(base.parent) not in recipe
    # One file says as much as the folder.
    single = sparsek.export_scorers(out, tmp_path / "one.safetensors").out
    model, tokenizer = sparsek.load(base, scorers=single, device="cpu", dtype="float32")
    assert torch.equal(model(IDS, use_cache=False).logits, logits(out))
    assert tokenizer("a").input_ids


def test_two_runs_write_one_file_of_scorers(scored, tmp_path, monkeypatch):
    """The first to be done has it, whole; its temporary file is nobody else's."""
    out, file = scored[1], tmp_path / "s.safetensors"
    link = os.link

    def later(part, target):
        monkeypatch.setattr(os, "link", link)
        sparsek.export_scorers(out, file)
        link(part, target)

    monkeypatch.setattr(os, "link", later)
    with pytest.raises(SparsekError, match="appeared meanwhile and is left alone"):
        sparsek.export_scorers(out, file)
    assert scorers_file.header(file) and [*tmp_path.iterdir()] == [file]
    sparsek.export_scorers(out, file, overwrite=True)

    def none(part, target):
        raise PermissionError

    monkeypatch.setattr(os, "link", none)  # a file system without such links
    assert scorers_file.header(Path(sparsek.export_scorers(out, tmp_path / "t.safetensors").out))


@pytest.mark.parametrize("family", KINDS)
def test_every_kind_of_family(family, make_checkpoint, give_scores, tmp_path):
    base = make_checkpoint(tmp_path / "base", family)
    out = Path(sparsek.convert(base, tmp_path / "out", topk=8, window=8, calibrate="none").out)
    give_scores(out, 5)
    scorers = sparsek.export_scorers(out, tmp_path / "scorers").out
    model, _ = sparsek.load(base, scorers=scorers, device="cpu", dtype="float32")
    assert torch.equal(model(IDS, use_cache=False).logits, logits(out))
    merged = sparsek.merge(base, scorers, tmp_path / "merged").out
    assert torch.equal(logits(merged), logits(out))


def test_converting_can_write_scorers_alone(llama, tmp_path):
    from typer.testing import CliRunner

    from sparsek_cli.app import app

    base, out = llama
    words = ["convert", str(base), str(tmp_path / "s"), "--scorers-only", "topk=8", "window=8"]
    words += ["calibrate=none", "--json", "-q"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0 and json.loads(done.stdout)["base_bytes_copied"] == 0
    assert {f.name for f in (tmp_path / "s").iterdir()} == {
        "README.md", "sparsek.safetensors", "sparsek.yaml"
    }  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["s"]  # nothing beside it is left
    merged = CliRunner().invoke(app, ["merge", str(base), str(tmp_path / "s"), str(tmp_path / "m")])
    assert merged.exit_code == 0, merged.output
    assert torch.equal(logits(tmp_path / "m"), logits(out))
    again = CliRunner().invoke(app, [*words[:-2], "--overwrite"])
    assert again.exit_code == 0, again.output
    assert "scorers, nothing of the base" in again.stdout
    assert "tokenizer " not in again.stdout and "hard link" not in again.stdout
    shown = CliRunner().invoke(app, [*words[:2], str(tmp_path / "x"), *words[3:], "--dry-run"])
    assert json.loads(shown.stdout)["scorers_only"] and not (tmp_path / "x").exists()


def test_calibrated_scorers_keep_their_report(llama, tmp_path):
    from verbs import convert

    from sparsek_cli.conversion.calibrate.method import Method
    from sparsek_cli.recipes.schema_convert import ConvertRecipe

    recipe = ConvertRecipe(
        model=str(llama[0]), out=str(tmp_path / "s"), scorers_only=True, topk=24, window=16,
        device="cpu", calibrate_tokens=512, calibrate_length=64,
    )  # fmt: skip
    method = Method(scorer="linear", documents="none", slopes=(0.3,), sizes=(0.5,))
    done = convert(recipe, method=method)
    merged = Path(sparsek.merge(llama[0], done.out, tmp_path / "m").out)
    assert json.loads((merged / "calibration.json").read_text()) == done.calibration


def test_every_verb_says_how_to_merge(scored, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from sparsek_cli.app import app

    base, _, scorers = scored
    single = tmp_path / "s.safetensors"
    shutil.copy(scorers / "sparsek.safetensors", single)
    for place in (scorers, single):
        for verb in (
            ["chat", "--prompt", "hi"],
            ["evaluate"],
            ["doctor"],
            ["finetune"],
            ["convert"],
            ["export"],
        ):
            done = CliRunner().invoke(app, [verb[0], str(place), *verb[1:]])
            assert isinstance(done.exception, UsageError), (verb, done.output)
            assert "holds scorers alone, made for base" in done.exception.message
            assert f"sparsek merge base {place} OUT" in done.exception.hint
    # The hint, followed where the base lies.
    monkeypatch.chdir(base.parent)
    assert (
        CliRunner().invoke(app, ["merge", "base", str(single), str(tmp_path / "m")]).exit_code == 0
    )


def test_a_model_that_never_evicts_goes_back_to_its_base(scored, tmp_path):
    """By a number that no text has: the way back to the dense model must stay open."""
    base, out, _ = scored
    wide = tmp_path / "wide"
    shutil.copytree(out, wide)
    config = json.loads((wide / "config.json").read_text())
    config["sparsek"]["topk"] = 10**9
    (wide / "config.json").write_text(json.dumps(config))
    sparsek.export(wide, tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(dense(IDS).logits, AutoModelForCausalLM.from_pretrained(base)(IDS).logits)
    scorers = sparsek.export_scorers(wide, tmp_path / "scorers").out
    assert Path(scorers).is_dir()
    # What is written anew is verified with a cache of its own.
    for write in (
        lambda out: sparsek.merge(base, scorers, out),
        lambda out: sparsek.convert(wide, out, again=True, calibrate="none"),
    ):
        with pytest.raises(UsageError, match="topk is 1,000,000,000, more than the 16,777,216"):
            write(tmp_path / "out")


def test_a_recipe_that_makes_other_scorers_says_so(scored, tmp_path):
    """Scorers that bring no recipe of their own are merged by settings alone."""
    base, out, scorers = scored
    found = read(scorers)
    file = tmp_path / "s.safetensors"
    scorers_file.write(file, found.tensors(), found.block, found.base, {})
    merged = Path(sparsek.merge(base, file, tmp_path / "merged").out)
    said = (merged / "sparsek.yaml").read_text()
    assert "converting\n# with them gives others" in said and "makes it again" not in said
    assert "makes it again" in (out / "sparsek.yaml").read_text()


def test_both_may_come_from_the_hub(scored, tmp_path, monkeypatch):
    import huggingface_hub

    base, out, scorers = scored
    asked = []

    def fetch(hub_id, **options):
        asked.append(hub_id)
        return str({"me/base": base, "me/scorers": scorers}[hub_id])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.chdir(tmp_path)
    done = sparsek.merge("me/base", "me/scorers", tmp_path / "m")
    assert set(asked) == {"me/base", "me/scorers"}
    assert torch.equal(logits(done.out), logits(out))


@pytest.mark.parametrize("tags", ["3", "word", "[1, word]", "{a: 1}"])
def test_a_card_with_odd_tags_is_sent(scored, tmp_path, tags):
    shutil.copytree(scored[1], tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text(f"---\ntags: {tags}\n---\ntext")
    found = push.plan(tmp_path / "out", "owner/name").matter["tags"]
    assert "sparsek" in found and "w" not in found


def test_a_tuned_model_s_scorers_do_not_fit_its_base(llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(llama[1])
    with torch.no_grad():
        model.get_input_embeddings().weight[5] += 1
    model.save_pretrained(tmp_path / "tuned")
    scorers = sparsek.export_scorers(tmp_path / "tuned", tmp_path / "s.safetensors").out
    with pytest.raises(UsageError, match="the weights of 'base' are others"):
        sparsek.merge(llama[0], scorers, tmp_path / "m")
    dense = sparsek.export(tmp_path / "tuned", tmp_path / "dense").out
    merged = sparsek.merge(dense, scorers, tmp_path / "m").out
    assert torch.equal(logits(merged), logits(tmp_path / "tuned"))
