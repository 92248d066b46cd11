"""Calibration in as many steps as these tests need, on prose that is read once."""

from __future__ import annotations

import pytest

from sparsek_cli.conversion.calibrate.scorers import mlp
from sparsek_cli.conversion.calibrate.sequences import texts

STEPS = mlp._STEPS


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """An MLP that has hardly learned is written, loaded and compared like any other."""
    monkeypatch.setattr(mlp, "_STEPS", {"cpu": 6})


@pytest.fixture
def all_steps(few_steps, monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of how well it learns."""
    monkeypatch.setattr(mlp, "_STEPS", STEPS)


@pytest.fixture(scope="session", autouse=True)
def _prose():
    """Python's docstrings, which every calibration on its own text parses anew."""
    read, source = [], texts._library_prose()

    def library_prose():
        yield from read
        for document in source:
            read.append(document)
            yield document

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "_library_prose", library_prose)
        yield
