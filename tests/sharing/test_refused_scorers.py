"""Scorers that are refused: made for another base, damaged, or no scorers at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file, save_file

import sparsek_cli as sparsek
from sparsek_cli import hub
from sparsek_cli.converted import SETTINGS
from sparsek_cli.errors import SparsekError, UsageError
from sparsek_cli.output import scorers_file
from sparsek_cli.scorers_alone.find import read
from sparsek_cli.serving import plan as serving
from sparsek_cli.sharing import push

IDS = torch.arange(3, 60)[None]
# What differs in names and shapes: a prefix in files, fused maps, layers of other kinds.
KINDS = ("gpt2", "gemma3_text", "nemotron_h")


def changed(base: Path, folder: Path, **settings) -> Path:
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_another_base_is_refused_by_name(scored, make_checkpoint, dense_config, tmp_path):
    base, _, scorers = scored
    other = make_checkpoint(tmp_path / "other", "llama", seed=1)
    cases = [
        (other, "the weights of 'other' are others"),
        (make_checkpoint(tmp_path / "half", "llama", dtype="bfloat16"), "weights of 'half'"),
        (make_checkpoint(tmp_path / "qwen", "qwen2"), "is a qwen2 model, theirs a llama"),
        (changed(base, tmp_path / "eps", rms_norm_eps=1e-3), "rms_norm_eps of 'eps' is 0.001"),
    ]
    for folder, words in cases:
        for attempt in (
            lambda at=folder: sparsek.merge(at, scorers, tmp_path / "m"),
            lambda at=folder: sparsek.load(at, scorers=scorers, device="cpu"),
        ):
            with pytest.raises(UsageError, match="made for another base, 'base'") as refusal:
                attempt()
            assert words in refusal.value.message
    assert not (tmp_path / "m").exists()
    # What differs by name only is the same base.
    same = changed(base, tmp_path / "same", transformers_version="4.40.0", use_cache=False)
    sparsek.load(same, scorers=scorers, device="cpu")


def test_what_is_not_scorers_is_refused(scored, llama, tmp_path):
    base, out, scorers = scored
    for place, words in [
        (out, "a whole model"),
        (base, "a whole model"),
        (tmp_path, "there are no scorers at"),
        (tmp_path / "absent", "there are no scorers at"),
        (out / "sparsek.safetensors", "holds no scorers of a base"),
        (out / "config.json", "holds no scorers of a base"),
    ]:
        with pytest.raises(UsageError, match=words):
            sparsek.merge(base, place, tmp_path / "m")
    with pytest.raises(UsageError, match="has scorers of its own"):
        sparsek.merge(out, scorers, tmp_path / "m")
    with pytest.raises(UsageError, match="is a dense model"):
        sparsek.export_scorers(base, tmp_path / "s")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes((out / "base-00001.safetensors").read_bytes())
    with pytest.raises(UsageError, match="is not a file of scorers"):
        sparsek.export_scorers(out, weights, overwrite=True)
    with pytest.raises(UsageError, match="is not a folder of scorers and is not replaced"):
        sparsek.export_scorers(llama[1], out, overwrite=True)


def test_damaged_scorers_are_refused(scored, tmp_path):
    base, _, scorers = scored
    found = read(scorers)
    tensors = found.tensors()
    for name, change in [
        ("missing", lambda t: t.pop("layers.1.bias")),
        ("shape", lambda t: t.update({"layers.0.weight": t["layers.0.weight"][:1]})),
        ("more", lambda t: t.update({"layers.7.bias": t["layers.0.bias"]})),
    ]:
        own = dict(tensors)
        change(own)
        file = tmp_path / f"{name}.safetensors"
        scorers_file.write(file, own, found.block, found.base, {})
        with pytest.raises(SparsekError, match="are damaged"):
            sparsek.merge(base, file, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_header_that_is_nested_deeply_is_none(tmp_path):
    parts = {"format": scorers_file.FORMAT, "sparsek": "[" * 10**5, "base": "{}", "texts": "{}"}
    save_file({"a": torch.zeros(1).numpy()}, tmp_path / "deep.safetensors", metadata=parts)
    with pytest.raises(SparsekError, match="deep.safetensors"):
        read(tmp_path / "deep.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        {"sinks": 10**12},
        {"sinks": "4"},
        {"topk": None},
        {"topk": [8]},
        {"window": -1},
        {"gate": "no"},
        {"scorer": "linear"},
        {"scorer": {"type": "mlp", "width": 10**9}},
    ],
)
def test_settings_that_are_none_are_refused(scored, tmp_path, change):
    base, _, scorers = scored
    found = read(scorers)
    file = tmp_path / "s.safetensors"
    scorers_file.write(file, found.tensors(), found.block | change, found.base, {})
    with pytest.raises(SparsekError, match=f"are damaged: .*{next(iter(change))}"):
        sparsek.merge(base, file, tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("key", SETTINGS)
def test_settings_that_are_missing_are_refused(scored, tmp_path, key):
    """Their defaults would be another model's, and nobody would see it."""
    base, out, scorers = scored
    found = read(scorers)
    file = tmp_path / "s.safetensors"
    block = {name: value for name, value in found.block.items() if name != key}
    scorers_file.write(file, found.tensors(), block, found.base, {})
    with pytest.raises(SparsekError, match=rf"are damaged: their settings lack {key}\n"):
        sparsek.merge(base, file, tmp_path / "m")
    with pytest.raises(SparsekError, match=rf"their settings lack {key}\n"):
        sparsek.load(base, scorers=file, device="cpu", dtype="float32")
    file.unlink()
    bad = shutil.copytree(out, tmp_path / "bad")
    config = json.loads((bad / "config.json").read_text())
    del config["sparsek"][key]
    (bad / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=f"'bad': .* lacks {key}, and"):
        sparsek.export_scorers(bad, file)
    with pytest.raises(UsageError, match=f"'bad': .* lacks {key}, and"):
        sparsek.convert(bad, tmp_path / "again", again=True, calibrate="none")
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


@pytest.mark.parametrize(
    "change", [{"num_hidden_layers": 1}, {"model_type": "sparsek_qwen2"}, {"intermediate_size": 8}]
)
def test_a_model_that_no_verb_could_load_is_not_sent_nor_its_scorers_taken(
    scored, tmp_path, change
):
    """Its files were sent as they lay there."""
    bad = tmp_path / "bad"
    shutil.copytree(scored[1], bad)
    config = json.loads((bad / "config.json").read_text())
    (bad / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(SparsekError, match="(lacks|holds|has shape|topk has)"):
        push.plan(bad, "someone/else")
    with pytest.raises(SparsekError):
        sparsek.export_scorers(bad, tmp_path / "s.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_scorers_are_not_taken_with_settings_that_are_none(scored, tmp_path):
    bad = tmp_path / "bad"
    shutil.copytree(scored[1], bad)
    config = json.loads((bad / "config.json").read_text())
    config["sparsek"]["window"] = 10**12
    (bad / "config.json").write_text(json.dumps(config))
    with pytest.raises(SparsekError, match="window is 1,000,000,000,000"):
        sparsek.export_scorers(bad, tmp_path / "s.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def flipped(file: Path, byte: int = -1) -> Path:
    """The file with one bit of a tensor's byte changed: another number, as good as any."""
    raw = bytearray(file.read_bytes())
    raw[byte] ^= 1
    file.unlink()  # not the one that it may be linked to
    file.write_bytes(raw)
    return file


@pytest.fixture
def converted(scored, tmp_path):
    """A folder as convert writes it; that of `scored` was given other scores by hand."""
    return Path(sparsek.convert(scored[0], tmp_path / "c", topk=8, window=8, calibrate="none").out)


def test_scorers_whose_bits_have_changed_since_they_were_written_are_damaged(
    scored, converted, tmp_path
):
    """They loaded: other numbers, all finite."""
    base, scorers = scored[0], scored[2] / "sparsek.safetensors"
    alone = flipped(Path(shutil.copy(scorers, tmp_path / "alone.safetensors")))
    with pytest.raises(SparsekError, match="not those that were written"):
        sparsek.merge(base, alone, tmp_path / "m")
    with pytest.raises(SparsekError, match="not those that were written"):
        sparsek.load(base, scorers=alone, device="cpu")
    sparsek.load(converted, device="cpu")
    file = flipped(converted / "sparsek.safetensors")
    for attempt in (
        lambda: sparsek.load(converted, device="cpu"),
        lambda: sparsek.export_scorers(converted, tmp_path / "s"),
        lambda: push.plan(converted, "someone/else"),
        lambda: serving.plan(hub.resolve(converted), engine="transformers"),
    ):
        with pytest.raises(SparsekError, match="not those that were written") as refusal:
            attempt()
        assert str(file) in refusal.value.message and "sparsek export" in refusal.value.hint
    sparsek.export(converted, tmp_path / "dense")  # as hinted
    sparsek.convert(tmp_path / "dense", tmp_path / "again", topk=8, window=8, calibrate="none")
    sparsek.load(tmp_path / "again", device="cpu")
    # What other programs write, and earlier versions wrote, says nothing of itself.
    save_file(load_file(file), file, metadata={"format": "pt"})
    sparsek.load(converted, device="cpu")
    flipped(file)
    sparsek.load(converted, device="cpu")


def test_scorers_that_are_no_numbers_go_nowhere(scored, tmp_path):
    base, out, scorers = scored
    found = read(scorers)
    tensors = found.tensors()
    tensors["layers.0.weight"][0, 0] = float("nan")
    file = tmp_path / "nan.safetensors"
    scorers_file.write(file, tensors, found.block, found.base, {})
    with pytest.raises(SparsekError, match=r"layers\.0\.weight holds values that are not finite"):
        sparsek.merge(base, file, tmp_path / "m")
    with pytest.raises(SparsekError, match="not finite"):
        sparsek.load(base, scorers=file, device="cpu", dtype="float32")
    bad = tmp_path / "bad"
    shutil.copytree(out, bad)
    own = load_file(bad / "sparsek.safetensors")
    next(iter(own.values())).flat[0] = float("inf")
    save_file(own, bad / "sparsek.safetensors")
    for place in ("s", "s.safetensors"):
        with pytest.raises(SparsekError, match="not finite"):
            sparsek.export_scorers(bad, tmp_path / place)
    with pytest.raises(SparsekError, match="not finite"):
        push.plan(bad, "someone/else")
    # As training of more than scorers leaves them: among the other weights.
    (bad / "sparsek.safetensors").rename(bad / "model.safetensors")
    with pytest.raises(SparsekError, match="not finite"):
        push._check_scorers(bad)
    assert {path.name for path in tmp_path.iterdir()} == {"nan.safetensors", "bad"}


def test_gguf_bases_are_refused(tmp_path):
    from sparsek_cli.conversion.plan import _check_scorers_only
    from sparsek_cli.recipes.schema_convert import ConvertRecipe

    with pytest.raises(UsageError, match="a GGUF file is no base"):
        _check_scorers_only(ConvertRecipe(), packed=True)
    with pytest.raises(UsageError, match="both given"):
        _check_scorers_only(ConvertRecipe(copy=True), packed=False)


DAMAGED = {"cut": b'{"a": ', "number": b"3", "deep": b"[\n" * 100_000, "binary": b"\xff\xfe\x00"}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_texts_beside_the_weights_are_named(scored, tmp_path, damage):
    """A recipe, a report or a card that is none: errors of libraries, from export and push."""
    binary = damage == "binary"
    for name, exported, pushed in (
        ("sparsek.yaml", True, True),
        ("calibration.json", binary, False),  # copied as it is
        ("README.md", False, binary),  # scorers get a card of their own
    ):
        folder = tmp_path / name
        shutil.copytree(scored[1], folder)
        (folder / name).write_bytes(DAMAGED[damage])
        for verb, refused in (
            (lambda at: sparsek.export_scorers(at, f"{at}-alone"), exported),
            (lambda at: push.plan(at, "owner/name"), pushed),
        ):
            if not refused:
                verb(folder)
                continue
            with pytest.raises(UsageError, match=name) as error:
                verb(folder)
            assert error.value.hint
