"""A converted model, and the packages that a server could be made of."""

from pathlib import Path

import pytest

from sparsek_cli.serving import engines

ROOT = Path(__file__).parents[3]


@pytest.fixture
def converted(dense_model, tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM

    from sparsek_cli.models import sparsek_config_from

    config = sparsek_config_from(dense_model("llama").config, {"topk": 8, "window": 8, "sinks": 2})
    folder = tmp_path / "converted"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def installed(monkeypatch):
    """`installed("vllm", ...)`: these packages are there, and no other that serves."""
    packages = ("vllm", "sparsek_vllm", *engines._SERVER_PARTS)
    real = engines.importlib.util.find_spec

    def install(*names):
        def find_spec(name, *rest):
            return (object() if name in names else None) if name in packages else real(name, *rest)

        monkeypatch.setattr(engines.importlib.util, "find_spec", find_spec)
        monkeypatch.syspath_prepend(ROOT / "plugins/vllm")  # what of it needs no vLLM

    return install


@pytest.fixture
def all_installed(installed):
    """Everything that serves is there."""
    installed("vllm", "sparsek_vllm", *engines._SERVER_PARTS)
