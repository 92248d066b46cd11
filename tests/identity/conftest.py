"""Bases and their conversions, each written once per session and only if somebody asks."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizer_shapes import SHAPES, VOCABULARY


@pytest.fixture
def saved(tmp_path: Path, sparse_model, tokenizer) -> Callable[..., Path]:
    """`saved(family)` -> the folder of a converted model with its tokenizer."""

    def save(family: str = "llama") -> Path:
        folder = tmp_path / family
        sparse_model(family).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def pair(tmp_path_factory, build_dense_model) -> Callable[[str, str], SimpleNamespace]:
    """`pair(family, shape)` -> `.base` and `.out`, a dense folder and its conversion.

    The weights of a family are the same for every tokenizer; 12 of 48 tokens are kept. `.out` is
    None where the base was refused; `.said` then is why.
    """
    from verbs import convert

    from sparsek_cli.errors import SparsekError
    from sparsek_cli.recipes.schema_convert import ConvertRecipe

    root = tmp_path_factory.mktemp("pairs")

    @functools.cache
    def weights(family: str) -> Path:
        folder = root / family
        model = build_dense_model(
            family, vocab_size=VOCABULARY, pad_token_id=None, bos_token_id=0, eos_token_id=0
        )
        model.save_pretrained(folder)
        return folder

    @functools.cache
    def make(family: str, shape: str) -> SimpleNamespace:
        base, out = root / f"{family}-{shape}", root / f"{family}-{shape}-sparse"
        base.mkdir()
        SHAPES[shape](base)
        for file in weights(family).iterdir():
            os.link(file, base / file.name)
        recipe = ConvertRecipe(
            model=str(base), out=str(out), calibrate="none", topk=6, window=4, sinks=2
        )
        try:
            return SimpleNamespace(base=base, out=out, said=convert(recipe).tokenizer)
        except SparsekError as refusal:
            return SimpleNamespace(base=base, out=None, said=refusal.message)

    return make


# One family for each shape, so that whoever takes these pairs meets all shapes and all families.
FAMILIES = ("gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3")
# Vocabulary files without tokenizer.json load for the families whose class reads them.
NEEDS = {"gpt2_vocabulary_only": "gpt2", "gpt2_named": "gpt2", "qwen2_vocabulary_only": "qwen3"}


IN_TURN = {s: NEEDS.get(s, FAMILIES[i % len(FAMILIES)]) for i, s in enumerate(SHAPES)}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items) -> None:
    """Every shape with one family, in turn, is in `make test`; with all, in `make slow-test`."""
    here = {*IN_TURN.items(), ("gpt2_named", "mistral")}  # transformers refuses the last
    for item in items:
        given = item.callspec.params if hasattr(item, "callspec") else {}
        if given.keys() == {"family", "shape"} and (given["shape"], given["family"]) not in here:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def shapes_in_turn() -> dict[str, str]:
    """By shape, the family that `any_pair` has it with."""
    return IN_TURN


@pytest.fixture(params=list(SHAPES))
def any_pair(request, pair) -> SimpleNamespace:
    """Runs the test once per shape, the families taking turns."""
    return pair(IN_TURN[request.param], request.param)
