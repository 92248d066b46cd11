"""Prefix selection and thresholds against the sequential heaps and against definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparsek_kernels.naive.heaps import heap_selection, heap_thresholds
from sparsek_kernels.operator import threshold
from sparsek_kernels.pytorch import selection, thresholds
from sparsek_kernels.pytorch.selection import prefix_topk
from sparsek_kernels.pytorch.thresholds import interior_counts, interior_runs, prefix_thresholds

KINDS = ("normal", "ties", "equal", "offset", "rising", "falling", "wide", "narrow", "spikes")


def scores_of(kind: str, rows: int, n: int) -> torch.Tensor:
    u = torch.randn(rows, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    t = torch.arange(n)
    return {
        "normal": u,
        "ties": (2 * u).round(),
        "equal": torch.full_like(u, 0.3),
        "offset": u + 1e4,
        "rising": u + 0.01 * t,
        "falling": u - 0.01 * t,
        "wide": 20 * u,
        "narrow": 0.1 * u,
        "spikes": torch.where(t % 17 == 3, 1e9, torch.where(t % 23 == 5, u - 1e4, u)),
    }[kind]


def free(rows: int, slots: int) -> torch.Tensor:
    return torch.full((rows, slots), -torch.inf, dtype=torch.float64)


@pytest.fixture(params=[(1024, 128), (7, 3)], ids=["chunk1024", "chunk7"])
def chunks(request, monkeypatch):
    """Also with tiny chunks, so that their borders fall everywhere."""
    for module in (selection, thresholds):
        monkeypatch.setattr(module, "CHUNK", request.param[0])
        monkeypatch.setattr(module, "CONTENDERS", request.param[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n, k", [(1, 1), (5, 1), (64, 3), (180, 40), (65, 70), (180, 1)])
def test_selection_and_tau_equal_the_heaps(kind, n, k, chunks):
    u = scores_of(kind, 2, n)
    end, _ = prefix_topk(u, free(2, k))
    tau = prefix_thresholds(u, torch.tensor([k, k]))
    for row in range(2):
        assert end[row].tolist() == heap_selection(u[row].tolist(), k)
        expected = torch.tensor(heap_thresholds(u[row].tolist(), k), dtype=torch.float64)
        assert torch.equal(tau[row].isinf(), expected.isinf())
        torch.testing.assert_close(tau[row], expected, atol=1e-9, rtol=0)
    assert (tau.diff()[tau[:, :-1] > -torch.inf] >= 0).all()


def test_long_stream_crosses_chunks():
    u = scores_of("normal", 3, 2500)
    end, _ = prefix_topk(u, free(3, 50))
    tau = prefix_thresholds(u, torch.tensor([50, 0, 20]))
    assert end[1].tolist() == heap_selection(u[1].tolist(), 50)
    assert (tau[1] == -torch.inf).all()
    for t in (49, 50, 1023, 1024, 2499):
        expected = threshold(u[0, : t + 1], 50)
        torch.testing.assert_close(tau[0, t], expected, atol=1e-11, rtol=0)
        torch.testing.assert_close(tau[2, t], threshold(u[2, : t + 1], 20), atol=1e-11, rtol=0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.integers(1, 10))
def test_integers_tie_the_way_the_heaps_do(values, k):
    u = torch.tensor([values], dtype=torch.float64)
    end, _ = prefix_topk(u, free(1, k))
    assert end[0].tolist() == heap_selection(values, k)
    tau = prefix_thresholds(u, torch.tensor([k]))[0]
    expected = torch.tensor(heap_thresholds(values, k), dtype=torch.float64)
    torch.testing.assert_close(tau, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("cut", [1, 8, 50, 119])
def test_carried_set_continues_the_run(cut, chunks):
    u, k = scores_of("ties", 2, 120), 8
    whole, _ = prefix_topk(u, free(2, k))
    first, _ = prefix_topk(u[:, :cut], free(2, k))
    kept, where = free(2, k), torch.full((2, k), -1)
    for row in range(2):
        alive = (first[row] == cut).nonzero()[:, 0]
        kept[row, : len(alive)] = u[row, alive]
        where[row, : len(alive)] = alive
    second, kept_end = prefix_topk(u[:, cut:], kept)
    assert torch.equal(second + cut, whole[:, cut:])
    for row in range(2):
        for slot, key in enumerate(where[row].tolist()):
            if key >= 0:
                assert kept_end[row, slot] + cut == whole[row, key]


def test_heads_of_smaller_k_lack_slots():
    u = scores_of("normal", 3, 100)
    kept = free(3, 9)
    kept[1, 4:] = torch.inf
    kept[2] = torch.inf
    end, _ = prefix_topk(u, kept)
    assert end[0].tolist() == heap_selection(u[0].tolist(), 9)
    assert end[1].tolist() == heap_selection(u[1].tolist(), 4)
    assert end[2].tolist() == list(range(100))


@pytest.mark.parametrize("cut", [3, 30, 90])
def test_thresholds_continue_from_their_support(cut):
    u, k = scores_of("normal", 2, 100), torch.tensor([6, 6])
    whole = prefix_thresholds(u, k)
    first = prefix_thresholds(u[:, :cut], k)
    support = u[:, :cut].masked_fill(~(u[:, :cut] > first[:, -1:]), -torch.inf)
    rest = prefix_thresholds(
        u[:, cut:], k, support=support, seen=torch.tensor([cut, cut]), tau=first[:, -1]
    )
    torch.testing.assert_close(rest, whole[:, cut:], atol=1e-12, rtol=0)


def test_absent_candidates_count_for_nothing():
    u = scores_of("normal", 1, 60)
    gaps = torch.full((1, 120), -torch.inf, dtype=torch.float64)
    gaps[:, 1::2] = u
    tau = prefix_thresholds(gaps, torch.tensor([5]))
    torch.testing.assert_close(tau[:, 1::2], prefix_thresholds(u, torch.tensor([5])))
    end, _ = prefix_topk(gaps, free(1, 5))
    expected = [2 * e + 1 if e < 60 else 120 for e in heap_selection(u[0].tolist(), 5)]
    assert end[0, 1::2].tolist() == expected


@pytest.mark.parametrize("kind", KINDS)
def test_interior_runs_are_the_predicate(kind):
    u = scores_of(kind, 2, 90)
    tau = prefix_thresholds(u, torch.tensor([7, 7]))
    joins = torch.arange(90)
    a, b = interior_runs(u, joins, tau)
    t = joins[None, None, :]
    run = (t >= a[:, :, None]) & (t < b[:, :, None])
    e, th = u[:, :, None], tau[:, None, :]
    assert torch.equal(run, (e > th) & (e - 1 < th) & (t >= joins[None, :, None]))
    assert torch.equal(interior_counts(u, joins, tau), run.sum(1))
