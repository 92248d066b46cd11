"""The packages that a server could be made of."""

from pathlib import Path

import pytest

from sparsek_cli.serving import engines

ROOT = Path(__file__).parents[3]


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
