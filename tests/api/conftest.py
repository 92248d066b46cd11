"""Caches and the note of the last model stay inside the test run."""

import pytest


@pytest.fixture(autouse=True)
def _own_folders(tmp_path_factory, monkeypatch):
    home = tmp_path_factory.getbasetemp()
    monkeypatch.setenv("SPARSEK_CACHE_DIR", str(home / "cache"))
    monkeypatch.setenv("SPARSEK_STATE_DIR", str(home / "state"))
