"""`--again`: scorers for the weights that a converted checkpoint has now."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from verbs import convert

import sparsek_cli.models  # noqa: F401
from sparsek_cli.checkpoint_files.shards import read_shards
from sparsek_cli.recipes.schema_convert import ConvertRecipe


def converted(model: Path, out: Path, **settings) -> Path:
    recipe = ConvertRecipe(model=str(model), out=str(out), **{"calibrate": "none", **settings})
    convert(recipe)
    return out


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def block(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["sparsek"]


def test_a_trained_checkpoint_keeps_its_base_and_its_settings(
    some_family, dense_checkpoint, tmp_path
):
    base = dense_checkpoint(some_family, max_shard_size="20KB")
    first = converted(base, tmp_path / "first", topk=6, window=5, sinks=2, gate="log")
    trained = tmp_path / "trained"
    model = AutoModelForCausalLM.from_pretrained(first)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.125)
    model.save_pretrained(trained)  # base and scorers in the same file
    again = converted(trained, tmp_path / "again", again=True)
    assert block(again) == block(first)
    after, before = tensors(again), tensors(trained)
    fresh = {name for name in before if ".scorer." in name}
    assert after.keys() == before.keys() and fresh
    for name in before:
        assert torch.equal(after[name], before[name]) != (name in fresh), name
    loaded, info = AutoModelForCausalLM.from_pretrained(again, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not any(p.any() for n, p in loaded.named_parameters() if n.endswith("scorer.weight"))


def test_what_is_named_changes_and_the_rest_stays(dense_checkpoint, tmp_path):
    first = converted(dense_checkpoint("llama"), tmp_path / "first", topk=6, window=5, sinks=2)
    again = converted(first, tmp_path / "again", again=True, budget=16)
    assert block(again) == block(first) | {"topk": 16 - 5 - 2}
    # Nothing was trained: the base's file is shared, as when it was converted first.
    assert (again / "base-00001.safetensors").samefile(first / "base-00001.safetensors")


def test_a_cache_in_8_bits_stays_one(dense_checkpoint, tmp_path):
    """It became one of twice the bytes, in silence."""
    sizes = {"topk": 6, "window": 5}
    first = converted(dense_checkpoint("llama"), tmp_path / "first", cache_dtype="int8", **sizes)
    assert block(converted(first, tmp_path / "again", again=True)) == block(first)
    named = converted(first, tmp_path / "named", again=True, cache_dtype="auto")
    assert "cache_dtype" in block(first) and "cache_dtype" not in block(named)


@pytest.mark.slow
def test_unchanged_weights_give_the_same_scorers(tmp_path):
    settings = dict(calibrate_tokens=2048, calibrate_length=256, calibrate="auto", device="cpu")
    first = converted("tiny", tmp_path / "first", topk=20, window=10, **settings)
    again = converted(first, tmp_path / "again", again=True, **settings)
    assert block(again) == block(first)
    first, again = tensors(first), tensors(again)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_dense_model_is_converted_as_ever(dense_checkpoint, tmp_path):
    base = dense_checkpoint("llama")
    out = converted(base, tmp_path / "out", again=True, topk=6)
    assert block(out)["topk"] == 6


def test_a_file_of_some_tensors_holds_their_bytes(tmp_path):
    from dataclasses import replace

    from sparsek_cli.checkpoint_files.shards import same_tensors, write_part

    generator = torch.Generator().manual_seed(0)
    held = {
        "a": torch.randn(3, 5, generator=generator).bfloat16(),
        "b": torch.randn(7, generator=generator),
        "c": torch.arange(4),
    }
    save_file(held, tmp_path / "model.safetensors", metadata={"tensor_names": '["a", "c"]'})
    (shard,) = read_shards(tmp_path)
    kept = {name: entry for name, entry in shard.tensors.items() if name != "b"}
    part = replace(shard, tensors=kept, part=True)
    write_part(part, tmp_path / "part.safetensors")
    read = load_file(tmp_path / "part.safetensors")
    assert read.keys() == kept.keys()
    assert all(torch.equal(read[name], held[name]) for name in read)
    with safe_open(tmp_path / "part.safetensors", "pt") as opened:  # torchao needs it to load them
        assert opened.metadata() == {"tensor_names": '["a", "c"]'}
    assert same_tensors(part, tmp_path / "part.safetensors")
    assert not same_tensors(shard, tmp_path / "part.safetensors")
    raw = bytearray((tmp_path / "part.safetensors").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "part.safetensors").write_bytes(raw)
    assert not same_tensors(part, tmp_path / "part.safetensors")
