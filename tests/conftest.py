"""Shared fixtures: tiny random dense models and a tokenizer, all built offline.

Everything here is random and small (two layers, hidden size 32): enough to hold shapes, masks,
caches and file formats to account in milliseconds. `sparse_model` gives the same weights with
SparseK attention and random scorers.
"""

from __future__ import annotations

import functools
import gc
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import interpreted
import pytest
from quick_configs import quick_configs
from quick_copies import copy_quickly
from quick_logging import catch_logs_quickly
from tiny_families import VOCAB_SIZE, tiny_config

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
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")  # ids 0, 1, 2


@functools.cache
def _seeding() -> Callable[[int], Any]:
    import torch

    return torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed


def seed_torch(seed: int) -> None:
    """`torch.manual_seed`, which without CUDA writes down stack traces, a millisecond's worth."""
    _seeding()(seed)


def tiny_dense_model(family: str, *, seed: int = 0, dtype: str = "float32", **overrides: Any):
    """A random dense causal LM of `family` in eval mode; the same seed gives the same weights."""
    import torch
    from transformers import AutoModelForCausalLM

    config = tiny_config(family, **overrides)
    with torch.random.fork_rng():
        seed_torch(seed)
        model = AutoModelForCausalLM.from_config(config)
    return model.to(getattr(torch, dtype)).eval()


def tiny_sparse_model(
    family: str,
    *,
    topk: Any = 3,
    window: int = 4,
    sinks: int = 1,
    gate: str = "straight_through",
    stand_ins: int = 0,
    seed: int = 0,
    dense: Any = None,
    **options: Any,
):
    """`tiny_dense_model(family, seed=, **options)` with SparseK attention, in eval mode.

    Its scorers are random with slope 0, so that no order of keys is special; so are `stand_ins`
    pairs of each query head, if any. `dense`: that model, where it is there already.
    """
    import torch
    from transformers import AutoModelForCausalLM

    import sparsek_cli.models as models

    dense = dense or tiny_dense_model(family, seed=seed, **options)
    settings = {"topk": topk, "window": window, "sinks": sinks, "gate": gate}
    if stand_ins:
        settings["scorer"] = {"type": "linear", "stand_ins": stand_ins}
    config = models.sparsek_config_from(dense.config, settings)
    with torch.random.fork_rng():
        seed_torch(seed + 1)
        model = AutoModelForCausalLM.from_config(config, dtype=dense.dtype)
    loaded = model.load_state_dict(dense.state_dict(), strict=False)
    assert not loaded.unexpected_keys
    assert all(".scorer." in name for name in loaded.missing_keys), loaded.missing_keys
    generator = torch.Generator().manual_seed(seed + 2)
    with torch.no_grad():
        for attention in models.sparsek_attentions(model):
            attention.scorer.slopes.zero_()
            if stand_ins:
                pairs = torch.randn(attention.scorer.stand_ins.shape, generator=generator)
                attention.scorer.stand_ins.copy_(pairs)
    return model.eval()


def tiny_tokenizer(chat: bool = True):
    """A byte-level tokenizer of exactly `VOCAB_SIZE` ids, built in memory.

    Ids 0, 1, 2 are pad, bos, eos; the rest are printable ASCII and the byte-level forms of
    newline and tab. Every ASCII text round-trips.

    Args:
        chat: add a small chat template (`<s>role: text</s>` lines).
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # Byte-level pre-tokenization writes space, newline and tab as these letters.
    letters = ["Ġ", "Ċ", "ĉ"] + [chr(code) for code in range(33, 127)]
    # Qwen2's own tokenizer class adds "<|endoftext|>" where it is missing, past the vocabulary.
    tokens = [*SPECIAL_TOKENS, "<|endoftext|>", *letters]
    vocab = {token: index for index, token in enumerate(tokens)}
    for index in range(len(vocab), VOCAB_SIZE):
        vocab[f"<unused{index}>"] = index
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=SPECIAL_TOKENS[0],
        bos_token=SPECIAL_TOKENS[1],
        eos_token=SPECIAL_TOKENS[2],
        padding_side="left",
        model_max_length=4096,
    )
    if chat:
        tokenizer.chat_template = (
            "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}</s>\n"
            "{% endfor %}{% if add_generation_prompt %}<s>assistant: {% endif %}"
        )
    return tokenizer


def save_tiny_checkpoint(
    folder: str | Path,
    family: str = "llama",
    *,
    max_shard_size: str | None = None,
    model: Any = None,
    **options: Any,
) -> Path:
    """Write a complete dense checkpoint (weights, config, tokenizer) and return its folder.

    Args:
        folder: where to write; created.
        family: a key of `tiny_families.TINY`.
        max_shard_size: e.g. "20KB", to get several shards and an index.
        model: what `tiny_dense_model` gives, where it is there already.
        options: passed to `tiny_dense_model` (seed, dtype, config overrides).
    """
    if model is not None:
        return _write_checkpoint(Path(folder), model, max_shard_size)
    key = repr((family, max_shard_size, sorted(options.items())))
    if key not in _written:
        made = Path(_checkpoints().name) / str(len(_written))
        model = tiny_dense_model(family, **options)
        _written[key] = _write_checkpoint(made, model, max_shard_size)
    shutil.copytree(_written[key], folder, copy_function=shutil.copyfile, dirs_exist_ok=True)
    return Path(folder)


# By what they are of: a few are asked for hundreds of times, and copied in a tenth of the time.
_written: dict[str, Path] = {}


@functools.cache
def _checkpoints() -> tempfile.TemporaryDirectory:
    """Where they are; gone with the process."""
    return tempfile.TemporaryDirectory(prefix="tiny-checkpoints-")


def _write_checkpoint(folder: Path, model: Any, max_shard_size: str | None) -> Path:
    extra = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    model.save_pretrained(folder, **extra)
    tiny_tokenizer().save_pretrained(folder)
    return folder


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
