"""A converted model on disk, for tools that load it or train it as they would any other."""

from __future__ import annotations

from pathlib import Path

import pytest

# A prompt longer than what is kept (1 sink, 3 selected, a window of 4).
LENGTH = 37


@pytest.fixture(scope="session")
def folder(tmp_path_factory, make_sparse, make_checkpoint) -> Path:
    """A tiny converted llama, its tokenizer beside it."""
    home = tmp_path_factory.mktemp("tools")
    make_checkpoint(home)
    make_sparse("llama").save_pretrained(home)  # over the dense one
    return home


@pytest.fixture
def model(folder):
    from transformers import AutoModelForCausalLM

    import sparsek_cli.models  # noqa: F401

    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture
def ids():
    import torch

    return torch.arange(3, 3 + LENGTH)[None]
