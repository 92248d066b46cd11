"""`sparsek export`: any program loads what appears, and it says what the base says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from patience import PATIENCE
from transformers import AutoModelForCausalLM, AutoTokenizer

import sparsek_cli as sparsek
from sparsek_cli.errors import UsageError
from sparsek_cli.families import TABLE

# What differs in files: fused and tied weights, renamed tensors, experts, other kinds of layers.
KINDS = ("gpt2", "gpt_neox", "opt", "mixtral", "gemma3_text", "nemotron_h")
IDS = torch.arange(3, 40)[None]

# A program that has never heard of this package.
_PLAIN = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
ids = torch.arange(3, 40)[None]
for base, dense in json.loads(sys.argv[1]):
    logits = []
    for folder in (base, dense):
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys")), info
        logits.append(model(ids).logits)
    assert torch.equal(*logits), dense
    texts = [AutoTokenizer.from_pretrained(folder)("a boat, 2 boats") for folder in (base, dense)]
    assert texts[0].input_ids == texts[1].input_ids
assert not any(name.startswith("sparsek") for name in sys.modules)
"""


def run_plain(pairs: list[tuple[Path, Path]]) -> None:
    words = json.dumps([[str(a), str(b)] for a, b in pairs])
    done = subprocess.run(
        [sys.executable, "-c", _PLAIN, words], capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_program_without_this_package_finds_the_base(llama, convert, make_checkpoint, tmp_path):
    pairs = [llama]
    for family in KINDS:
        base = make_checkpoint(tmp_path / family, family)
        pairs.append((base, convert(base, tmp_path / f"{family}-sparse")))
    dense = []
    for base, out in pairs:
        done = sparsek.export(out, tmp_path / f"{base.parent.name}-{base.name}-dense")
        dense.append((base, Path(done.out)))
        config = json.loads((Path(done.out) / "config.json").read_text())
        original = json.loads((base / "config.json").read_text())
        assert not {"sparsek", "auto_map"} & config.keys()
        dropout = TABLE[original["model_type"]].dropout
        differing = {k for k in original if config.get(k) != original[k]}
        assert differing <= {dropout}, differing
    run_plain(dense)


def test_what_was_trained_comes_along_and_scorers_do_not(sparse_model, tokenizer, tmp_path):
    """As finetune writes it: scorers and base in one file."""
    model = sparse_model("qwen2", dtype="bfloat16")
    model.save_pretrained(tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "tuned")
    done = sparsek.export(tmp_path / "tuned", tmp_path / "dense")
    assert done.data()["linked_by"] == ["copy"]
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert type(dense).__name__ == "Qwen2ForCausalLM" and dense.dtype == torch.bfloat16
    own = {k: v for k, v in model.state_dict().items() if ".scorer." not in k}
    assert own.keys() == dense.state_dict().keys()
    assert all(torch.equal(v, dense.state_dict()[k]) for k, v in own.items())


def test_nothing_is_copied_and_side_files_come_along(llama, tmp_path):
    base, out = llama
    source = tmp_path / "source"
    source.mkdir()
    for file in out.iterdir():
        (source / file.name).hardlink_to(file)
    (source / "LICENSE").write_text("Apache")
    (source / "chat_template.jinja").unlink(missing_ok=True)
    (source / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").write_text("tool")
    done = sparsek.export(source, tmp_path / "dense")
    assert "copy" not in done.means and len(done.means) > 1
    dense = tmp_path / "dense"
    assert (dense / "LICENSE").read_text() == "Apache"
    assert (dense / "generation_config.json").is_file()
    templates = AutoTokenizer.from_pretrained(dense).chat_template
    assert templates == AutoTokenizer.from_pretrained(source).chat_template
    assert not list(dense.glob("sparsek*.safetensors")) + list(dense.glob("*.py"))
    # What was exported can be converted again, and exported over.
    sparsek.convert(dense, tmp_path / "again", topk=8, window=8, calibrate="none")
    with pytest.raises(UsageError, match="exists") as refusal:
        sparsek.export(source, dense)
    assert "--overwrite" in refusal.value.hint
    copied = sparsek.export(source, dense, overwrite=True, copy=True)
    assert set(copied.means) == {"copy"}


@pytest.mark.parametrize("size", [None, "20KB"])
def test_llama_cpp_s_converter_finds_every_tensor(make_checkpoint, convert, tmp_path, size):
    """It looks for model*.safetensors, wants an index of just what they hold, and knows names."""
    gguf = pytest.importorskip("gguf")
    from sparsek_cli.checkpoint_files.shards import read_shard

    base = make_checkpoint(tmp_path / "base", max_shard_size=size)
    dense = Path(sparsek.export(convert(base, tmp_path / "sparse"), tmp_path / "dense").out)
    parts = sorted(dense.glob("*.safetensors"))
    assert all(part.name.startswith("model") for part in parts)
    held = {name for part in parts for name in read_shard(part).tensors}
    if size is not None:
        index = json.loads((dense / "model.safetensors.index.json").read_text())["weight_map"]
        assert index.keys() == held and {*index.values()} == {part.name for part in parts}
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    assert all(known.get_name(name, try_suffixes=(".weight",)) for name in held)


def test_the_verb_shows_and_writes(llama, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from sparsek_cli.app import app

    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke
    shown = run(app, ["export", str(llama[1]), "--dry-run", "--json"])
    assert json.loads(shown.stdout)["architectures"] == ["LlamaForCausalLM"]
    assert not (tmp_path / "out-dense").exists()
    done = json.loads(run(app, ["export", str(llama[1]), "--json", "-q"]).stdout)
    assert done["out"] == str(tmp_path / "out-dense")
    assert (tmp_path / "out-dense" / done["files"][0]).is_file()
    assert "dry run" in run(app, ["export", str(llama[1]), "x", "--dry-run"]).stdout


def test_dense_models_are_refused(llama, tmp_path):
    with pytest.raises(UsageError, match="dense model already"):
        sparsek.export(llama[0], tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


def test_a_failure_leaves_nothing(llama, tmp_path, monkeypatch):
    from sparsek_cli.sharing import dense

    def fail(plan, folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(dense, "_verify", fail)
    with pytest.raises(KeyboardInterrupt):
        sparsek.export(llama[1], tmp_path / "dense")
    assert list(tmp_path.iterdir()) == []
