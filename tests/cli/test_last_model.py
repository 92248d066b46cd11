"""Verbs without MODEL: the last model made here, else the bundled one, and they say so."""

import os
from pathlib import Path

import pytest

from sparsek_cli.commands import last_model


@pytest.fixture
def made(tmp_path):
    folder = tmp_path / "made"
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (folder / "model.safetensors").touch()
    return folder


def test_remembered_until_the_folder_is_gone(made):
    assert last_model.recall() is None
    last_model.remember(made)
    assert last_model.recall() == made
    said = []
    assert Path(last_model.name_or_default(None, say=said.append)) == made
    assert str(made) in said[0] and "last" in said[0]
    (made / "config.json").unlink()
    assert last_model.recall() is None


def test_without_memory_the_bundled_model():
    said = []
    assert last_model.name_or_default(None, say=said.append) == "tiny"
    assert "bundled" in said[0] and "follows no instructions" in said[0]


def test_a_named_model_is_not_announced(made):
    said = []
    assert last_model.name_or_default(str(made), say=said.append) == str(made)
    assert said == []


@pytest.mark.parametrize("content", ["", "{", "[]", '{"path": 3}', '{"other": "x"}', "[" * 10**5])
def test_damaged_memory_is_no_memory(content):
    file = last_model.state_file()
    file.parent.mkdir(parents=True)
    file.write_text(content)
    assert last_model.recall() is None


def test_a_pipe_is_no_memory_and_nobody_waits_for_it():
    file = last_model.state_file()
    file.parent.mkdir(parents=True)
    os.mkfifo(file)
    assert last_model.recall() is None


def test_unwritable_state_is_no_failure(monkeypatch, made, tmp_path):
    (tmp_path / "a-file").touch()
    monkeypatch.setenv("SPARSEK_STATE_DIR", str(tmp_path / "a-file" / "below"))
    last_model.remember(made)
    assert last_model.recall() is None


def test_state_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.delenv("SPARSEK_STATE_DIR")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert last_model.state_file() == tmp_path / "sparsek" / "last-model.json"
