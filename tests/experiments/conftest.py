"""A little text for toy runs of the experiments."""

import json

import numpy as np
import pytest

from sparsek_cli.data.generated_text import generated_text


@pytest.fixture(autouse=True)
def _own_folders(tmp_path_factory, monkeypatch):
    """Caches and the note of the last model stay inside the test run."""
    home = tmp_path_factory.getbasetemp()
    monkeypatch.setenv("SPARSEK_CACHE_DIR", str(home / "cache"))
    monkeypatch.setenv("SPARSEK_STATE_DIR", str(home / "state"))


@pytest.fixture
def novels(tmp_path):
    """Files of text to train on and to measure."""
    files = []
    for number, name in enumerate(("train", "held-out")):
        file = tmp_path / f"{name}.jsonl"
        rng = np.random.default_rng(number)
        rows = [json.dumps({"text": generated_text(rng, 300)}) for _ in range(3)]
        file.write_text("\n".join(rows) + "\n")
        files.append(str(file))
    return files
