"""One family at a time: its dense model, the same weights with SparseK, and a checkpoint of both.

Checkpoints are converted once per family, by the command line, and shared by its tests; calibrated
are those of one family of a kind, and in `make slow-test` all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tiny_families import KINDS, family_name

TOKENS = 40
# Calibrated with all there is: sharing out slots compares nine whole models, and documents that are
# told again are long. Both depend on kinds of layers: one family of a kind stands for others.
_WHOLE = (
    "llama", "gemma2", "gemma3_text", "gpt_oss", "afmoe", "lfm2", "qwen3_next", "jamba",
    "granitemoehybrid", "nemotron_h", "falcon_h1",
)  # fmt: skip


# What is done with a converted model depends on its kinds of layers, not on its row.
_DONE = (
    "calibrates", "finetuning_reaches_every_scorer", "saves_and_reloads", "evaluates", "chats",
    "generates_what_prefill_says", "packed_documents_do_not_see_each_other",
)  # fmt: skip
_VERBS = tuple(f"test_families.py::test_{done}[" for done in _DONE)
_OF_A_KIND = {*_WHOLE, "gpt2", "gpt_neox", "phi3", "mixtral", "cohere2", "olmo2"}
_OF_A_KIND |= {"gemma4_text-routed", "gemma3n_text-shared"}
_OF_A_KIND -= {"granitemoehybrid"}  # Mamba beside attention, as in Nemotron-H


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items) -> None:
    """Verbs run for one family of a kind here, and for all of them in `make slow-test`."""
    for item in items:
        verb = any(name in item.nodeid for name in _VERBS)
        if verb and item.callspec.params["every_family"] not in _OF_A_KIND:
            item.add_marker(pytest.mark.slow)


@dataclass(frozen=True)
class Made:
    """A family's tiny models: `dense`, and `sparse` with its weights and random scorers.

    Attributes:
        family: its model type.
    """

    family: str
    dense: Any
    sparse: Any


@dataclass(frozen=True)
class Checkpoints:
    """Folders: `base`, and `out`, which the command line made of it."""

    base: Path
    out: Path


@pytest.fixture(scope="module", params=KINDS)
def every_family(request) -> str:
    """Runs the tests of a module once per family, one family after the other."""
    return request.param


@pytest.fixture(scope="module", autouse=True)
def _own_folders(tmp_path_factory):
    """The note of the last model and caches stay inside the test run."""
    home = tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSEK_CACHE_DIR", str(home / "cache"))
        patch.setenv("SPARSEK_STATE_DIR", str(home / "state"))
        yield


@pytest.fixture
def ids():
    import torch

    return torch.randint(4, 128, (2, TOKENS))


@pytest.fixture(scope="session")
def story(tmp_path_factory) -> Path:
    """Some thousand letters of text to calibrate, train and measure on."""
    names, things = ("Anna", "Bertha", "Clara"), ("boat", "house", "letter", "garden")
    lines = [f"{names[i % 3]} saw the {things[i * 5 % 4]} {i} times." for i in range(400)]
    path = tmp_path_factory.mktemp("story") / "story.txt"
    path.write_text(" ".join(lines), encoding="utf-8")
    return path


def run_cli(*words: Any) -> str:
    """What `sparsek WORDS` prints; it must end well."""
    from typer.testing import CliRunner

    from sparsek_cli.app import app

    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="session")
def cli():
    """`cli("convert", base, out, ...)` -> what it prints."""
    return run_cli


@pytest.fixture(scope="module")
def made(every_family, make_dense, make_sparse) -> Made:
    """The family's models; what takes pairs away: 1 sink, 3 selected, a window of 4."""
    dense = make_dense(every_family)
    return Made(family_name(every_family), dense, make_sparse(every_family, dense=dense))


@pytest.fixture(scope="module")
def base(every_family, made, make_checkpoint, tmp_path_factory) -> Path:
    """The family's dense checkpoint."""
    folder = tmp_path_factory.mktemp(every_family) / "base"
    return make_checkpoint(folder, every_family, model=made.dense)


@pytest.fixture(scope="module")
def converted(every_family, base, request) -> Checkpoints:
    """The family's folders; where calibrated ones are made anyway, those."""
    if every_family in _OF_A_KIND:
        return request.getfixturevalue("checkpoints")
    out = base.with_name("uncalibrated")
    run_cli("convert", base, out, "topk=24", "window=16", "calibrate=none")
    return Checkpoints(base, out)


@pytest.fixture(scope="module")
def checkpoints(every_family, base, story) -> Checkpoints:
    """The family's folders, calibrated on 512 tokens, or 2,048."""
    from verbs import convert

    from sparsek_cli.conversion.calibrate.method import Method
    from sparsek_cli.recipes.schema_convert import ConvertRecipe

    if every_family in _WHOLE:
        documents, text = "retold", {"calibrate_tokens": 2048, "calibrate_length": 256}
    else:
        documents, text = "none", {"calibrate_tokens": 512, "calibrate_length": 64}
        text["budgets"] = "uniform"
    out = base.with_name("out")
    recipe = ConvertRecipe(
        model=str(base),
        out=str(out),
        topk=24,
        window=16,
        calibrate=str(story),
        device="cpu",
        **text,
    )
    convert(
        recipe, method=Method(scorer="linear", slopes=(0.3,), sizes=(0.5,), documents=documents)
    )
    return Checkpoints(base, out)
