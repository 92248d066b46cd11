"""Kernels compiled beside other work: what is asked for is what conversions ask for."""

from __future__ import annotations

from contextlib import nullcontext
from threading import Event, Timer
from types import SimpleNamespace

import pytest
import torch
from patience import PATIENCE

from sparsek_cli.conversion.calibrate.sensitivity import compile_ahead as module
from sparsek_cli.conversion.calibrate.sensitivity.compile_ahead import Document, compile_ahead
from sparsek_cli.models.logits import Logits

PLAN = SimpleNamespace(
    geometry=SimpleNamespace(heads=4, kv_heads=2, head_dim=8), topk=12, window=6, sinks=2
)
READ, LEARNT = Document(60, turns=3, turn_length=9), Document(70)


def test_a_cpu_compiles_nothing(monkeypatch):
    monkeypatch.setattr(module, "Thread", None)
    compile_ahead(PLAN, Logits(0.3), torch.zeros(1, 1, 4), [READ], [LEARNT])()


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


@pytest.fixture
def card(monkeypatch):
    """Something like inputs on the second GPU; a thread's current device is noted."""
    entered = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext(entered.append(device)))
    made = SimpleNamespace(device=torch.device("cuda:1"), free=1 << 40, entered=entered)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (made.free, made.free))
    return made


def test_what_fails_there_fails_nowhere_else(monkeypatch, caplog, card):
    caplog.set_level("INFO", "sparsek_cli")

    def fails(*args, **kwargs):
        raise RuntimeError("no ptxas")

    monkeypatch.setattr(module, "_attend", fails)
    monkeypatch.setattr(module, "Event", lambda: SimpleNamespace(set=int, is_set=bool))  # not yet
    compile_ahead(PLAN, Logits(0.3), card, [READ, READ], [LEARNT])()
    assert "no ptxas" in caplog.text and card.entered == [card.device]


@pytest.mark.parametrize(("free", "asked"), [(1 << 40, 4), (1000, 0)])
def test_each_shape_is_asked_for_twice_where_there_is_room(free, asked, monkeypatch, card):
    card.free, seen = free, []
    monkeypatch.setattr(module, "_attend", lambda *args, **how: seen.append((args[3], how)))
    monkeypatch.setattr(module, "Event", lambda: SimpleNamespace(set=int, is_set=bool))
    compile_ahead(PLAN, Logits(0.3), card, [READ, READ], [LEARNT])()
    assert len(seen) == asked
    assert not seen or [how["odd"] for _, how in seen] == [0, 1, 0, 1]


def test_once_it_is_ended_nothing_more_is_compiled(monkeypatch, card):
    begun, go_on, seen = Event(), Event(), []

    def attend(*args, **how):
        seen.append(how)
        begun.set()
        go_on.wait(PATIENCE)

    monkeypatch.setattr(module, "_attend", attend)
    end = compile_ahead(PLAN, Logits(0.3), card, [READ], [LEARNT])
    assert begun.wait(PATIENCE)
    Timer(0.2, go_on.set).start()
    end()
    assert len(seen) == 1
