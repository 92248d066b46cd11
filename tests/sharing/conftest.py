"""Folders of converted models, each made once: a plain one, and one of several files."""

from __future__ import annotations

from pathlib import Path

import pytest

import sparsek_cli as sparsek


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
