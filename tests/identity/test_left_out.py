"""Of several weights in a folder, and of meanings of a name, one is taken: never in silence."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from bad_models import INDEX, SINGLE, linked
from transformers import AutoTokenizer

from sparsek_cli import hub
from sparsek_cli.app import run
from sparsek_cli.conversion.from_gguf import checkpoint

# Beside whole weights: what is not read and must be named.
BESIDE = {
    "gguf": ["model-q4.gguf"],
    "several-gguf": ["a.gguf", "b.GGUF"],
    "pickle": ["pytorch_model.bin"],
    "other-names": ["consolidated.safetensors"],
    "shards-without-index": ["model-00001-of-00002.safetensors"],
    "adapter-without-config": ["adapter_model.safetensors"],
    "other-frameworks": ["flax_model.msgpack", "tf_model.h5"],
}


@pytest.fixture(scope="module")
def good(tmp_path_factory, make_checkpoint) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("left-out") / "good")


@pytest.fixture
def heard(caplog):
    """`heard()` -> the warnings so far, as the command line shows them."""

    def lines() -> list[str]:
        return [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]

    return lines


def with_files(good: Path, folder: Path, *names: str, without: tuple[str, ...] = ()) -> Path:
    linked(good, folder, *without)
    for name in names:
        (folder / name).write_bytes(b"GGUF")
    return folder


@pytest.mark.parametrize("kind", BESIDE)
def test_what_is_not_read_is_named(good, tmp_path, heard, kind):
    folder = with_files(good, tmp_path / "m", *BESIDE[kind])
    assert hub.resolve(folder).path == folder
    (line,) = heard()
    assert f"{SINGLE} is read" in line and f"{', '.join(BESIDE[kind])} is not" in line


def test_of_many_files_some_are_named(good, tmp_path, heard):
    hub.resolve(with_files(good, tmp_path / "m", *(f"{i}.gguf" for i in range(5))))
    assert "0.gguf, 1.gguf, 2.gguf and 2 more is not" in heard()[0]


def test_shards_that_the_index_does_not_name(tmp_path, make_checkpoint, heard):
    folder = make_checkpoint(tmp_path / "m", max_shard_size="20KB")
    hub.resolve(folder)
    assert heard() == []
    os.link(next(folder.glob("model-00001*")), folder / "model-00001-of-00009.safetensors")
    hub.resolve(folder)
    assert "model-00001-of-00009.safetensors is not" in heard()[0] and (folder / INDEX).exists()


def test_what_a_trainer_leaves_is_no_model(good, tmp_path, heard):
    names = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "scaler.pt")
    hub.resolve(with_files(good, tmp_path / "m", *names))
    assert heard() == []


@pytest.mark.parametrize(
    "words",
    [
        ("doctor",),
        ("convert", "out", "--calibrate", "none", "--dry-run"),
        ("chat", "--prompt", "hi", "--max-new-tokens", "1"),
        ("bench", "generate", "--lengths", "8", "--tokens", "1", "--repeats", "1"),
        ("evaluate", "-o", "out", "--tasks", "recall_1", "--dry-run"),
        ("finetune", "out", "--data", "text.txt", "train=all", "sequence_length=32", "--dry-run"),
    ],
    ids=lambda words: words[0],
)
def test_every_verb_says_it_once(good, tmp_path, heard, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPARSEK_STATE_DIR", str(tmp_path / "state"))
    (tmp_path / "text.txt").write_text("a few words and a few more. " * 400)
    folder = with_files(good, tmp_path / "m", "model.gguf")
    at = 2 if words[0] == "bench" else 1
    # `bench generate` then wants a converted model.
    ended = 1 if words[0] == "bench" else 0
    assert run([*words[:at], str(folder), *words[at:], "--device", "cpu"]) == ended
    assert sum("model.gguf is not" in line for line in heard()) == 1


def test_without_config_a_gguf_file_beside_other_weights_is_no_choice(
    good, tmp_path, monkeypatch, capsys
):
    """Whoever forgot config.json would get another model than the one beside it."""
    monkeypatch.chdir(tmp_path)
    for number, other in enumerate((SINGLE, "pytorch_model.bin", "adapter_model.safetensors")):
        folder = with_files(good, tmp_path / str(number), without=("config.json", SINGLE))
        (folder / "a.gguf").write_bytes(b"GGUF")
        (folder / other).write_bytes(b"")
        assert run(["convert", str(folder), "out"]) == 2
        error, hint = capsys.readouterr().err.strip().splitlines()
        assert "a.gguf" in error and other in error and "which is meant" in error
        assert f"name the file: '{folder / 'a.gguf'}'" in hint  # a damaged one here
    assert not (tmp_path / "out").exists()


def test_with_config_and_nothing_else_the_gguf_file_is_pointed_at(good, tmp_path, capsys):
    """So lie most repositories of GGUF files on the hub."""
    folder = with_files(good, tmp_path / "m", "a.gguf", without=(SINGLE,))
    for verb in (["convert"], ["chat", "--prompt", "hi"]):
        assert run([*verb[:1], str(folder), *verb[1:]]) == 2
        said = capsys.readouterr().err
        assert "but a.gguf, which only convert reads" in said
        found = re.search(r"`sparsek (convert) (\S+) OUT` unpacks it", said)
        assert found and Path(found[2]).is_file()


def test_a_folder_called_as_a_known_model(good, tmp_path, heard, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("tiny").source == "bundled" and heard() == []
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "a.gguf").write_bytes(b"GGUF")
    assert checkpoint.find("tiny") is None
    assert hub.resolve("tiny").source == "bundled" and "has no config.json" in heard()[-1]
    shutil.rmtree(folder)
    linked(good, folder)
    assert hub.resolve("tiny").path == folder
    assert heard()[-1] == "'tiny' is the folder here; the model of that short name is not read"
    said = len(heard())
    assert hub.tokenizer_of("tiny").path == folder
    assert heard()[said:] == ["'tiny' is the folder here; the model of that short name is not read"]


def as_json(value) -> str:
    return json.dumps({"chat_template": value})


A, B = "{{ messages[0].content }}", "{{ messages[0].role }}"
TEMPLATES = {
    "file-and-config": (
        {"chat_template.jinja": A, "tokenizer_config.json": B}, "chat_template.jinja",
    ),
    "named-and-config": (
        {"additional_chat_templates/tool_use.jinja": A, "tokenizer_config.json": B},
        "additional_chat_templates/",
    ),
    "config-and-processors": (
        {"tokenizer_config.json": A, "chat_template.json": as_json(B)}, "tokenizer_config.json",
    ),
    "config-and-folder": (
        {"tokenizer_config.json": A, "chat_templates/chat_template.jinja": B},
        "tokenizer_config.json",
    ),
    "processors-alone": ({"chat_template.json": as_json(A)}, None),
}  # fmt: skip


def with_templates(good: Path, folder: Path, files: dict[str, str]) -> Path:
    linked(good, folder, "tokenizer_config.json", "chat_template.jinja")
    config = json.loads((good / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    own = files.get("tokenizer_config.json")
    files = files | {"tokenizer_config.json": json.dumps(config | json.loads(as_json(own)))}
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("kind", TEMPLATES)
def test_of_templates_that_differ_the_one_that_counts_is_named(good, tmp_path, heard, kind):
    """And it is the one that transformers takes."""
    files, counts = TEMPLATES[kind]
    folder = with_templates(good, tmp_path / "m", files)
    hub.resolve(folder)
    (line,) = heard()
    assert (f"that of {counts} counts" if counts else "none is read") in line
    assert all(name.split("/")[0] in line for name in files)
    loaded = AutoTokenizer.from_pretrained(folder).chat_template
    taken = loaded["tool_use"] if isinstance(loaded, dict) else loaded
    assert taken == (A if counts else None)


def test_templates_that_say_the_same_are_nothing_to_tell(good, tmp_path, heard):
    files = {"chat_template.jinja": f"{A}\n", "tokenizer_config.json": A}
    hub.resolve(with_templates(good, tmp_path / "m", files))
    assert heard() == []
