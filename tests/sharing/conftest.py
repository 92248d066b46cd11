"""Folders of converted models, each made once: a plain one, one of several files, and scorers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

import sparsek_cli as sparsek
import sparsek_cli.models as models


@pytest.fixture(scope="module", autouse=True)
def _own_folders(tmp_path_factory):
    home = tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSEK_CACHE_DIR", str(home / "cache"))
        patch.setenv("SPARSEK_STATE_DIR", str(home / "state"))
        yield


def convert_to(base: Path, out: Path, **settings) -> Path:
    settings = {"topk": 8, "window": 8, "calibrate": "none", "device": "cpu", **settings}
    return Path(sparsek.convert(base, out, **settings).out)


@pytest.fixture
def convert():
    """`convert(base, out, **settings)` -> the folder; uncalibrated, 16 slots and sinks."""
    return convert_to


@pytest.fixture(scope="session")
def llama(tmp_path_factory, make_checkpoint) -> tuple[Path, Path]:
    """A base of several files and its conversion."""
    home = tmp_path_factory.mktemp("llama")
    base = make_checkpoint(home / "base", "llama", max_shard_size="20KB")
    return base, convert_to(base, home / "out")


def give_scores_to(folder: Path, topk) -> None:
    """Scorers that choose, in place of the neutral ones of a conversion without calibration."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(1)
    tensors = load_file(folder / "sparsek.safetensors")
    for name, array in tensors.items():
        tensors[name] = torch.randn(array.shape).numpy()
        if name.endswith("slopes"):
            tensors[name] = 0 * tensors[name]
    file = folder / "sparsek.safetensors"
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    sparse = models.sparse_layers(model.config)
    heads = models.kv_heads(model.config)
    rows = [[topk + 1] + [topk] * (heads - 1) if i in sparse else None for i in range(2)]
    config["sparsek"] |= {"topk": rows, "cache_dtype": "int8"}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def give_scores():
    """`give_scores(folder, topk)`."""
    return give_scores_to


@pytest.fixture(scope="module")
def scored(tmp_path_factory, make_checkpoint):
    """A base, its conversion with scorers that choose, and those alone in a folder."""
    home = tmp_path_factory.mktemp("scored")
    base = make_checkpoint(home / "base", "llama", max_shard_size="20KB")
    out = sparsek.convert(base, home / "out", topk=8, window=8, calibrate="none").out
    give_scores_to(Path(out), 5)
    return base, Path(out), Path(sparsek.export_scorers(out, home / "scorers").out)
