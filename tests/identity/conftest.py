"""Folders of converted models, written once per session."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def saved(tmp_path: Path, sparse_model, tokenizer):
    """`saved(family)` -> the folder of a converted model with its tokenizer."""

    def save(family: str = "llama") -> Path:
        folder = tmp_path / family
        sparse_model(family).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save
