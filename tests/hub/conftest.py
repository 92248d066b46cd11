"""Folders that look like checkpoints; the hub is not asked."""

import json

import pytest


@pytest.fixture(autouse=True)
def _own_state(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEK_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def checkpoint(tmp_path):
    """`checkpoint(name, config, *files)` writes a folder that looks like one."""

    def make(name="base", config=None, *files):
        folder = tmp_path / name
        folder.mkdir()
        config = {"architectures": ["LlamaForCausalLM"]} if config is None else config
        text = config if isinstance(config, str) else json.dumps(config)
        (folder / "config.json").write_text(text)
        for file in files or ("model.safetensors",):
            # Of safetensors the shortest: a header that lists nothing.
            empty = (2).to_bytes(8, "little") + b"{}"
            (folder / file).write_bytes(empty if file.endswith(".safetensors") else b"")
        return folder

    return make
