"""Quantised checkpoints that are not read: refused by name before anything is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sparsek_cli as sparsek
from sparsek_cli import quantised
from sparsek_cli.conversion.plan import plan
from sparsek_cli.errors import SparsekError
from sparsek_cli.quantised import checks
from sparsek_cli.recipes.schema_convert import ConvertRecipe


@pytest.fixture(scope="module")
def plain(tmp_path_factory, make_checkpoint) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("plain") / "base", "llama")


def changed(plain: Path, folder: Path, block: object, **tensors: object) -> Path:
    """A copy whose config.json has this block, and whose weights include these."""
    shutil.copytree(plain, folder)
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": block}
    (folder / "config.json").write_text(json.dumps(config))
    if tensors:
        file = folder / "model.safetensors"
        save_file(load_file(file) | tensors, file, metadata={"format": "pt"})
    return folder


def refusal(base: Path, out: Path) -> SparsekError:
    with pytest.raises(SparsekError) as refused:
        sparsek.convert(base, out, topk=8, window=8, calibrate="none")
    assert not out.exists()
    return refused.value


@pytest.mark.parametrize("method", [*quantised.REFUSED, "of_tomorrow"])
def test_methods_that_are_not_read_say_why(method, plain, tmp_path):
    base = changed(plain, tmp_path / "base", {"quant_method": method})
    error = refusal(base, tmp_path / "out")
    why = quantised.REFUSED.get(method, "transformers knows no such method")
    assert error.message == f"'base' is quantised ({method}), and is not read: {why}"
    assert "the checkpoint it was made from" in error.hint


@pytest.mark.parametrize("method", quantised.METHODS)
def test_plain_weights_that_claim_to_be_quantised(method, plain, tmp_path):
    base = changed(plain, tmp_path / "base", {"quant_method": method})
    error = refusal(base, tmp_path / "out")
    assert "config.json says that weights are quantised" in error.message
    # The hint, followed.
    config = json.loads((base / "config.json").read_text())
    del config["quantization_config"]
    (base / "config.json").write_text(json.dumps(config))
    sparsek.convert(base, tmp_path / "out", topk=8, window=8, calibrate="none")


@pytest.mark.parametrize("method", [m for m, found in quantised.METHODS.items() if found.needs])
def test_a_missing_or_old_package_is_named(method, plain, tmp_path, monkeypatch):
    mark = f"model.layers.0.mlp.up_proj{quantised.METHODS[method].marks[0]}"
    block = {"quant_method": method}
    if method == "compressed-tensors":
        block["config_groups"] = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4}}}
    base = changed(plain, tmp_path / "base", block, **{mark: torch.zeros(4)})
    package, least = next(iter(quantised.METHODS[method].needs.items()))
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    error = refusal(base, tmp_path / "out")
    assert f"{package} is not installed" in error.message
    assert f'pip install "{package}>={least}"' in error.hint
    monkeypatch.setattr(checks, "find_spec", lambda name: object())
    monkeypatch.setattr(checks.metadata, "version", lambda name: "0.0.1")
    assert f"{package} is 0.0.1, older than {least}" in refusal(base, tmp_path / "out").message


_WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
_GROUP = {"targets": ["Linear"], "weights": _WEIGHTS}


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"config_groups": {"a": _GROUP, "b": _GROUP}}, "of more than one kind"),
        ({"config_groups": {}}, "of more than one kind, or of none"),
        ({"config_groups": {"a": _GROUP}, "transform_config": {"r": {}}}, "are rotated"),
        ({"config_groups": {"a": _GROUP}, "sparsity_config": {"format": "x"}}, "are sparse, too"),
    ],
)
def test_what_would_be_unpacked_wrongly(more, why, plain, tmp_path):
    block = {"quant_method": "compressed-tensors", **more}
    scale = {"model.layers.0.mlp.up_proj.weight_scale": torch.zeros(4)}
    base = changed(plain, tmp_path / "base", block, **scale)
    assert why in refusal(base, tmp_path / "out").message


def test_eight_bits_without_their_scale(plain, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    weight = load_file(plain / "model.safetensors")[name].to(torch.float8_e4m3fn)
    other = {"model.layers.0.mlp.down_proj.weight_scale_inv": torch.ones(1, 1), name: weight}
    base = changed(plain, tmp_path / "base", {"quant_method": "fp8"}, **other)
    assert f"{name} has no scale beside it" in refusal(base, tmp_path / "out").message


def test_tensors_that_are_called_otherwise_are_no_plain_ones(plain, tmp_path):
    """As vLLM's FP8 files are. Who took the block out, as hinted, was refused again."""
    scale = {"model.layers.0.mlp.up_proj.weight_scale": torch.ones(1)}
    base = changed(plain, tmp_path / "base", {"quant_method": "fp8"}, **scale)
    error = refusal(base, tmp_path / "out")
    assert "weight_scale is packed, and no tensor's name ends in .weight_scale_inv" in error.message
    assert "the checkpoint it was made from" in error.hint


@pytest.mark.parametrize("block", [{}, {"load_in_4bit": False}, {"bits": 4}, "awq"])
def test_plain_weights_beside_a_block_without_a_method(block, plain, tmp_path):
    base = changed(plain, tmp_path / "base", block)
    error = refusal(base, tmp_path / "out")
    assert "names no method, and the weights are plain" in error.message
    config = json.loads((base / "config.json").read_text())
    del config["quantization_config"]  # as hinted
    (base / "config.json").write_text(json.dumps(config))
    apart = base / "quantize_config.json"  # left from what it was made from
    apart.write_text("{}")
    error = refusal(base, tmp_path / "out")
    assert "its weights are plain" in error.message and "move quantize_config.json" in error.hint
    apart.unlink()
    sparsek.convert(base, tmp_path / "out", topk=8, window=8, calibrate="none")


def test_families_whose_activations_are_scaled_too(make_checkpoint, tmp_path):
    plain = make_checkpoint(tmp_path / "plain", "starcoder2")
    packed = {"model.layers.0.mlp.c_fc.qweight": torch.zeros(4, 4, dtype=torch.int32)}
    base = changed(plain, tmp_path / "base", {"quant_method": "awq"}, **packed)
    assert "activations are scaled" in refusal(base, tmp_path / "out").message


@pytest.mark.parametrize(
    ("family", "keys", "stored"),
    [
        ("gpt_neox", {"num_key_value_heads": 2}, "uint8"),  # a key that the family does not have
        ("gpt_neox", {"head_dim": 4}, "uint8"),
        ("gpt_neox", {"num_key_value_heads": 2}, "float8_e4m3fn"),
        ("llama", {"num_key_value_heads": 4}, "float8_e4m3fn"),
    ],
)
def test_heads_that_packed_weights_do_not_have(make_checkpoint, tmp_path, family, keys, stored):
    """By the plan: loading refused them after everything was written."""
    base, scaled = make_checkpoint(tmp_path / "plain", family), {}
    for name, weight in load_file(base / "model.safetensors").items():
        if name.endswith(("query_key_value.weight", "k_proj.weight")):
            packed = weight.to(getattr(torch, stored))
            packed = packed.view(-1, 1) if stored == "uint8" else packed  # no shape of the model
            scaled |= {name: packed, f"{name}_scale_inv": torch.ones(1, 1)}
    block = {"quant_method": "fp8"}
    base = changed(base, tmp_path / "base", block, **scaled)
    plan(ConvertRecipe(model=str(base), out=str(tmp_path / "out"), topk=8, window=8))
    config = json.loads((base / "config.json").read_text()) | keys
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(SparsekError, match="KV heads of") as refused:
        plan(ConvertRecipe(model=str(base), out=str(tmp_path / "out"), topk=8, window=8))
    assert "take them out" in refused.value.hint
