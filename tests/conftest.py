"""Shared fixtures: tiny models (support/tiny_models.py), and what makes many tests quick and alike.

`sparse_model` gives the weights of `dense_model` with SparseK attention and random scorers.
"""

from __future__ import annotations

import functools
import gc
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import interpreted
import pytest
from quick_configs import quick_configs
from quick_copies import copy_quickly
from quick_logging import catch_logs_quickly
from tiny_families import tiny_config
from tiny_models import (
    save_tiny_checkpoint,
    seed_torch,
    tiny_dense_model,
    tiny_sparse_model,
    tiny_tokenizer,
)

# Tests never reach the network; set before transformers reads them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Four threads are started for each model that is loaded, to read a few kilobytes.
os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")
# Tensors are tiny and workers share the cores: threads that wait for each other cost minutes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell starts what runs in its background with Ctrl-C ignored, and every child inherits that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The families that most tests run on; tests/families holds all of them to the essentials.
FAMILY_NAMES = ("llama", "mistral", "qwen2", "qwen3", "gpt_neox", "gpt2")


@pytest.fixture(params=FAMILY_NAMES)
def family(request) -> str:
    """Runs the test once per family."""
    return request.param


# Their weights are stored in different ways, their positions too.
_SOME = ("llama", "gpt2")


@pytest.fixture(
    params=[
        *_SOME, *(pytest.param(n, marks=pytest.mark.slow) for n in FAMILY_NAMES if n not in _SOME)
    ]
)  # fmt: skip
def some_family(request) -> str:
    """Runs the test for two families, in `make slow-test` for all that `family` has."""
    return request.param


@pytest.fixture(scope="session")
def make_dense() -> Callable[..., Any]:
    """`dense_model`, for fixtures that live longer than a test."""
    return tiny_dense_model


@pytest.fixture(scope="session")
def make_sparse() -> Callable[..., Any]:
    """`sparse_model`, for fixtures that live longer than a test."""
    return tiny_sparse_model


@pytest.fixture(scope="session")
def make_checkpoint() -> Callable[..., Path]:
    """`save_tiny_checkpoint(folder, family, **options)`."""
    return save_tiny_checkpoint


@pytest.fixture
def dense_config() -> Callable[..., Any]:
    """`tiny_config(family, **overrides)`."""
    return tiny_config


@pytest.fixture
def dense_model() -> Callable[..., Any]:
    """`tiny_dense_model(family, seed=, dtype=, **overrides)`."""
    return tiny_dense_model


@pytest.fixture(scope="session")
def build_dense_model() -> Callable[..., Any]:
    """`dense_model` for fixtures of a whole session."""
    return tiny_dense_model


@pytest.fixture
def sparse_model() -> Callable[..., Any]:
    """`tiny_sparse_model(family, topk=, window=, sinks=, gate=, ...)`."""
    return tiny_sparse_model


@pytest.fixture
def tokenizer():
    """`tiny_tokenizer()`."""
    return tiny_tokenizer()


@pytest.fixture
def dense_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """`dense_checkpoint(family="llama", name="base", **options)` writes one, returns its folder."""

    def make(family: str = "llama", name: str = "base", **options: Any) -> Path:
        return save_tiny_checkpoint(tmp_path / name, family, **options)

    return make


def pytest_configure(config: pytest.Config) -> None:
    """Before the first record is caught."""
    patch = pytest.MonkeyPatch()
    config.add_cleanup(patch.undo)
    catch_logs_quickly(patch)
    copy_quickly(patch)


def pytest_collectstart() -> None:
    """No kernel is defined yet. Who starts workers collects nothing, and they inherit the word."""
    interpreted.define_kernels_interpreted()
    gc.disable()  # what is imported is no garbage, and looking for some takes a fifth of the time


def pytest_collection_finish() -> None:
    """What imports and collection made stays: trainers collect garbage, which read all of it.

    Models and graphs of tiny tensors are made by the thousand, and hardly any is garbage.
    """
    gc.enable()
    gc.set_threshold(20_000, 20, 20)
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _stays():
    """And what a file's tests imported: at the end of a run each collection took half a second."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def no_figures():
    """Evaluations draw none, which are most of a tiny one's time; gives what draws them.

    A test about figures asks for the fixture `figures`.
    """
    from sparsek_cli.evaluation.report import plots

    real = plots.figures
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "figures", lambda report: {})
        yield real


@pytest.fixture
def figures(no_figures, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """`sparsek_cli.evaluation.report.plots.figures`, in force while this test runs."""
    monkeypatch.setattr("sparsek_cli.evaluation.report.plots.figures", no_figures)
    return no_figures


@pytest.fixture(scope="session", autouse=True)
def _one_command_line():
    """Typer builds every verb's options anew for each line, which takes most lines' time."""
    import typer.main
    import typer.testing

    built = functools.cache(typer.main.get_command)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.main, "get_command", built)
        patch.setattr(typer.testing, "_get_command", built)
        yield


@pytest.fixture(scope="session", autouse=True)
def _nothing_is_drawn_for_the_meta_device():
    """Where weights have no values, PyTorch works out in Python how they would be drawn."""
    real = {}

    def drawn(name: str) -> Callable[..., Any]:
        def draw(tensor, *args, **kwargs):
            return tensor if tensor.is_meta else real[name](tensor, *args, **kwargs)

        return functools.wraps(real[name])(draw)

    from torch.nn import init

    with pytest.MonkeyPatch.context() as patch:
        for name in ("_no_grad_normal_", "_no_grad_uniform_", "kaiming_uniform_"):
            real[name] = getattr(init, name)
            patch.setattr(init, name, drawn(name))
        yield


@pytest.fixture(scope="module", autouse=True)
def _quick_configs():
    """From the first file on before which transformers is imported."""
    with quick_configs():
        yield


@pytest.fixture(scope="session", autouse=True)
def _quick_interpreter():
    """Where Triton's kernels are interpreted; gives what puts Triton's language back."""
    if not interpreted.is_on():
        yield None
        return
    from quick_interpreter import quick_interpreter

    with quick_interpreter() as put_back:
        yield put_back


@pytest.fixture(autouse=True)
def _interpreted(request, _quick_interpreter):
    """Only who is marked so may run Triton's kernels on the CPU."""
    if interpreted.is_on() and request.node.get_closest_marker("interpret"):
        with interpreted.may_be_run():
            yield
        _quick_interpreter()
    else:
        yield


@pytest.fixture(scope="session")
def clean_program(tmp_path_factory):
    """`clean_program(code)` -> exit code, stdout and stderr of a program that never imported us."""
    from clean_programs import CleanPrograms

    programs = CleanPrograms(tmp_path_factory.mktemp("programs"))
    yield programs
    programs.close()


@pytest.fixture(autouse=True)
def _seeded():
    """Every test starts from the same random state, whatever ran before it."""
    if "torch" in sys.modules:
        seed_torch(0)
