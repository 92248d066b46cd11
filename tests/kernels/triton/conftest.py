"""Everything a Triton test allocates starts poisoned, so that an unwritten output shows."""

import pytest
import torch

from gluon_emulator.values import POISON


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    def poisoned(make):
        def call(*args, **kwargs):
            made = make(*args, **kwargs)
            if made.is_floating_point():
                return made.fill_(float("nan"))
            return made.fill_(POISON[made.dtype]) if made.dtype in POISON else made

        return call

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))


@pytest.fixture
def device(request):
    """CPU for the interpreter, CUDA for tests marked `gpu`."""
    return "cuda" if request.node.get_closest_marker("gpu") else "cpu"
