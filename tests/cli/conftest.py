"""Runs `sparsek` in this process, as the console entry point would."""

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass
class Outcome:
    """Exit code and the two streams."""

    code: int
    out: str
    err: str

    def failed(self, code: int) -> bool:
        """Whether this is an error as users are promised it: two lines and no traceback."""
        lines = self.err.strip().splitlines()
        return (
            self.code == code
            and len([line for line in lines if line.startswith("error: ")]) == 1
            and len([line for line in lines if line.startswith("hint: ")]) == 1
            and lines[-2].startswith("error: ")
            and "Traceback" not in self.err
        )


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEK_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture
def sparsek(capfd) -> Callable[..., Outcome]:
    """`sparsek("convert", "tiny", ...)` -> Outcome."""

    def call(*words: object) -> Outcome:
        from sparsek_cli.app import run

        _let_libraries_speak_here()
        capfd.readouterr()
        code = run([str(word) for word in words])
        return Outcome(code, *capfd.readouterr())

    return call


def _let_libraries_speak_here() -> None:
    """Their handlers hold the stderr of whichever test imported them first, closed since."""
    for library in ("transformers", "datasets", "huggingface_hub"):
        for handler in logging.getLogger(library).handlers:
            if type(handler) is logging.StreamHandler:
                # Not setStream, which flushes the closed one.
                handler.stream, handler.flush = sys.stderr, sys.stderr.flush


@pytest.fixture
def converted(dense_model, tokenizer, tmp_path):
    """Folder of a small converted Llama of random weights, with its tokenizer."""
    from transformers import AutoModelForCausalLM

    from sparsek_cli.models import sparsek_config_from

    config = sparsek_config_from(dense_model("llama").config, {"topk": 8, "window": 8, "sinks": 2})
    folder = tmp_path / "converted"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
