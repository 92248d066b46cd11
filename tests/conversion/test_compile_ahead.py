"""Kernels compiled beside other work: what is asked for is what conversions ask for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sparsek_cli.conversion.calibrate.sensitivity import compile_ahead as module
from sparsek_cli.conversion.calibrate.sensitivity.compile_ahead import Document, compile_ahead
from sparsek_cli.models.logits import Logits

PLAN = SimpleNamespace(
    geometry=SimpleNamespace(heads=4, kv_heads=2, head_dim=8), topk=12, window=6, sinks=2
)
READ, LEARNT = Document(60, turns=3, turn_length=9), Document(70)


def test_a_cpu_compiles_nothing():
    assert compile_ahead(PLAN, Logits(0.3), torch.zeros(1, 1, 4), [READ], [LEARNT]) is None


@pytest.mark.parametrize(("document", "learns"), [(READ, False), (LEARNT, True)])
def test_documents_are_attended_to_as_in_a_conversion(document, learns, monkeypatch):
    seen = []
    own = module.sparse_attention

    def attend(recorded, scores, **settings):
        out = own(recorded, scores, **settings)
        seen.append((recorded, settings["topk"], out))
        return out

    monkeypatch.setattr(module, "sparse_attention", attend)
    state = torch.random.get_rng_state()
    with torch.no_grad():  # a caller's, as calibration's
        for odd in (0, 1):
            module._attend(PLAN, Logits(0.3), torch.zeros(1), document, odd=odd, learns=learns)
    assert torch.equal(state, torch.random.get_rng_state())  # nothing that is drawn depends on it
    for (recorded, topk, out), expected in zip(seen, ([0, 6], [1, 7]), strict=True):
        assert topk == expected
        assert recorded.context == document.context
        assert out.isfinite().all()
        assert (recorded.query.grad is not None) == learns


def test_what_fails_there_fails_nowhere_else(monkeypatch, caplog):
    caplog.set_level("INFO", "sparsek_cli")

    def fails(*args, **kwargs):
        raise RuntimeError("no ptxas")

    monkeypatch.setattr(module, "_attend", fails)
    like = SimpleNamespace(device=torch.device("cuda"))
    compile_ahead(PLAN, Logits(0.3), like, [READ, READ], [LEARNT]).join()
    assert "no ptxas" in caplog.text
