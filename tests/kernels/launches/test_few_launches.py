"""Some thousand tokens are read, and learnt from, as fast as the CPU asks: it asks for little."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from interpreted import replace_launches
from sparsek_kernels import SparseKState, StateRows, dispatch, sparsek_attention
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

TOKENS, HEADS, GROUPS, DIM = 4096, 32, 8, 64
SHAPE = dict(topk=(380, 90) * 4, window=128, sinks=4)


class Operations(TorchDispatchMode):
    """Counts what PyTorch is asked for, memory and views included: each costs microseconds."""

    def __init__(self):
        super().__init__()
        self.done = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.done[str(function.overloadpacket)] += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch):
    """Kernels that a call on an H200 launches, in order; none is."""
    from sparsek_kernels.triton import pipeline

    launched = []
    replace_launches(monkeypatch, lambda kernel, *args, **options: launched.append(kernel.__name__))
    monkeypatch.setattr(dispatch, "_no_triton", lambda device: None)
    monkeypatch.setattr(dispatch, "_not_by_itself", lambda device: None)
    monkeypatch.setattr(pipeline, "device_capability", lambda device: (9, 0))
    return launched


def fresh():
    kept = {"dtype": torch.bfloat16, "filled": False}
    return {"state": SparseKState.empty(1, GROUPS, DIM, **kept, **SHAPE), "fresh": True}


def held():
    return fresh() | {"fresh": False}


def pooled():
    pool = SparseKState.empty(4, GROUPS, DIM, dtype=torch.bfloat16, **SHAPE)
    rows = StateRows(pool, torch.tensor([1, 2]), torch.tensor([True, False]))
    return {"state": rows, "cu_seqlens": torch.tensor([0, 1000, TOKENS], dtype=torch.int32)}


def alone():
    return {}


@torch.no_grad()
@pytest.mark.parametrize(
    "given, most_launches, most_operations",
    [(fresh, 5, 9), (held, 6, 14), (pooled, 6, 14), (alone, 4, 9)],
)
def test_a_call_asks_for_little(launches, given, most_launches, most_operations):
    q, k, v = (
        torch.zeros(1, TOKENS, heads, DIM, dtype=torch.bfloat16).transpose(1, 2)
        for heads in (HEADS, GROUPS, GROUPS)
    )
    scores, slopes = torch.zeros(1, TOKENS, GROUPS).transpose(1, 2), torch.zeros(GROUPS)
    for _ in range(2):  # what depends on shapes is made by the first call, and kept
        launches.clear()
        options = given()
        with Operations() as asked:
            sparsek_attention(q, k, v, scores, slopes=slopes, **SHAPE, **options)
    assert len(launches) <= most_launches, launches
    assert sum(asked.done.values()) <= most_operations, asked.done


@pytest.mark.parametrize(
    "lengths, most_launches, most_operations", [([TOKENS], 14, 32), ([1000, TOKENS - 1000], 15, 40)]
)
def test_gradients_ask_for_little(launches, lengths, most_launches, most_operations):
    inputs = [
        torch.zeros(1, TOKENS, heads, DIM, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
        for heads in (HEADS, GROUPS, GROUPS)
    ]
    inputs.append(torch.zeros(1, GROUPS, TOKENS).requires_grad_())
    slopes = torch.zeros(GROUPS).requires_grad_()
    bounds = torch.tensor([0, *lengths]).cumsum(0).int() if len(lengths) > 1 else None
    for _ in range(2):
        out = sparsek_attention(*inputs, slopes=slopes, cu_seqlens=bounds, **SHAPE)
        grad = torch.zeros_like(out)
        launches.clear()
        with Operations() as asked:
            torch.autograd.grad(out, [*inputs, slopes], grad)
    assert len(launches) <= most_launches, launches
    assert sum(asked.done.values()) <= most_operations, asked.done
