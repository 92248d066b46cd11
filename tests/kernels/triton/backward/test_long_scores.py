"""tau, interior runs and the gradient of the scores by their definitions, in rows of any length."""

import pytest
import torch
from sparsek_kernels.triton.backward import scores as kernels
from sparsek_kernels.triton.geometry import geometry
from sparsek_kernels.triton.thresholds import descent
from torch.nn.functional import pad

TOPK, WINDOW, SINKS, GROUP = (90, 7), 30, 3, 2
ASKED = 50  # queries of a document whose tau is looked at


def check(device, batch, bounds, offset):
    draw, n = torch.Generator().manual_seed(0), bounds[-1]
    e = torch.randn(batch, 2, n, generator=draw).double() * 3 + offset
    e[torch.rand(e.shape, generator=draw) < 0.1] = -torch.inf
    columns = torch.randn(batch, 2, n, generator=draw)
    rows = torch.randn(batch, 2 * GROUP, n, generator=draw)
    e, columns, rows = e.to(device), columns.to(device), rows.to(device)
    documents = torch.tensor(bounds, dtype=torch.int32) if len(bounds) > 2 else None
    shape = geometry((batch, 2 * GROUP, n, 1), (batch, 2, n, 1), e.device, documents)
    tau = descent.prefix_thresholds(e, TOPK, WINDOW, shape, SINKS)
    runs, changes = kernels.interior_runs(e, tau, WINDOW, shape, SINKS)
    de = kernels.score_gradient(columns, rows, runs, changes)
    sums = rows.double().unflatten(1, (2, GROUP)).sum(2)
    for first, last in zip(bounds, bounds[1:], strict=False):
        if first == last:
            continue
        for row, head in ((b, h) for b in range(batch) for h in range(2)):
            at = (row, head, slice(first, last))
            check_taus(e[at], tau[at], TOPK[head])
            start, stop = runs_of(e[at], tau[at])
            some = start < stop
            assert torch.equal(runs[0][at] < runs[1][at], some)
            assert torch.equal((runs[0][at] - first)[some], start[some].int())
            assert torch.equal((runs[1][at] - first)[some], stop[some].int())
            taken = means_taken(start, stop, sums[at])
            torch.testing.assert_close(de[at], columns[at].double() - taken, atol=1e-9, rtol=0)
    return tau, *runs, de


def check_taus(e, tau, k):
    """Gates of a query's candidates sum up to k, or all are 1 where it has at most k."""
    assert (tau[1:] >= tau[:-1] - 1e-9).all()
    for t in torch.linspace(0, len(e) - 1, ASKED).long().unique().tolist():
        candidates = e[SINKS : max(t - WINDOW + 1, SINKS)]
        candidates = candidates[candidates > -torch.inf]
        mass = (candidates - tau[t]).clamp(0, 1).sum().item()
        assert abs(mass - min(k, len(candidates))) < 1e-7, t


def runs_of(e, tau):
    start = torch.searchsorted(tau, e - 1, right=True)
    start = start.maximum(torch.arange(len(e), device=e.device) + WINDOW)
    stop = torch.searchsorted(tau, e).maximum(start)
    start[:SINKS] = stop[:SINKS] = 0
    return start.clamp(max=len(e)), stop.clamp(max=len(e))


def means_taken(start, stop, sums):
    change = torch.zeros(len(sums) + 1, dtype=torch.int64, device=sums.device)
    one = torch.ones_like(start)
    change.scatter_add_(0, start, one).scatter_add_(0, stop, -one)
    total = pad((sums / change.cumsum(0)[:-1].clamp(min=1)).cumsum(0), (1, 0))
    return total[stop] - total[start]


@pytest.mark.interpret
@pytest.mark.parametrize("batch, bounds", [(2, [0, 400]), (1, [0, 1, 250, 250, 700, 700])])
def test_rows_of_many_blocks(monkeypatch, batch, bounds):
    monkeypatch.setattr(kernels, "BLOCK", 32)
    monkeypatch.setattr(descent, "SUMS", ((0, 64),))
    check("cpu", batch, bounds, 1e4)


@pytest.mark.gpu
@pytest.mark.parametrize("offset", [0, 1e4])
@pytest.mark.parametrize(
    "batch, bounds",
    [
        (2, [0, 4096]),
        (1, [0, 1, 4000, 4000, 9001, 9001]),
        (2, [0, 20_001]),
        (1, [0, 131_072]),
        (1, [0, 33_000, 33_001, 70_000]),
    ],
)
def test_rows_of_real_lengths(batch, bounds, offset):
    found, again = (check("cuda", batch, bounds, offset) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
