"""Interior runs, and the gradient of the scores, against sums over all pairs."""

import pytest
import torch
from sparsek_kernels.triton.backward import scores as kernels
from sparsek_kernels.triton.geometry import geometry

pytestmark = pytest.mark.interpret

WINDOW = 3
CASES = {  # batch, groups, query heads of a group, bounds of documents, block
    "one key": (2, 1, 2, [0, 1], 16),
    "one block": (2, 2, 1, [0, 16], 16),
    "a block and a key": (1, 2, 3, [0, 17], 16),
    "more blocks than fit one": (2, 2, 1, [0, 300], 16),
    "documents": (1, 2, 2, [0, 1, 1, 2, 70, 70, 200, 200], 32),
}


def rising(batch, groups, bounds, draw):
    """tau [B, G, N] as `prefix_thresholds` leaves it: -inf at first, then it rises or stays."""
    tau = (torch.rand(batch, groups, bounds[-1], generator=draw) < 0.1).double()
    for first, last in zip(bounds, bounds[1:], strict=False):
        own = tau[..., first:last]
        own.copy_(own.cumsum(-1) / 4 - 1)
        own[..., : 2 + (last - first) // 10] = -torch.inf
    return tau


def interior(e, tau, bounds, sinks):
    """[B, G, N, M] bool: key j is interior at query t."""
    first = torch.empty(bounds[-1], dtype=torch.long)
    for start, stop in zip(bounds, bounds[1:], strict=False):
        first[start:stop] = start
    t, j = torch.arange(bounds[-1])[:, None], torch.arange(bounds[-1])
    meets = (first[:, None] == first) & (t >= j + WINDOW) & (j - first >= sinks)
    return meets & (e[:, :, None] > tau[..., None]) & (e[:, :, None] - 1 < tau[..., None])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sinks", [0, 2])
def test_against_sums_over_all_pairs(monkeypatch, case, sinks):
    batch, groups, group, bounds, block = CASES[case]
    monkeypatch.setattr(kernels, "BLOCK", block)
    n, draw = bounds[-1], torch.Generator().manual_seed(0)
    tau = rising(batch, groups, bounds, draw)
    e = torch.rand(batch, groups, n, generator=draw, dtype=torch.float64) * (n / 40 + 2) - 1.5
    e[torch.rand(e.shape, generator=draw) < 0.3] = -torch.inf
    e = torch.where(e * 4 % 2 > 1, (e * 4).round() / 4, e)  # some are tau, to the bit
    documents = torch.tensor(bounds, dtype=torch.int32) if len(bounds) > 2 else None
    heads = groups * group
    shape = geometry((batch, heads, n, 1), (batch, groups, n, 1), e.device, documents)
    runs, changes = kernels.interior_runs(e, tau, WINDOW, shape, sinks)
    pairs = interior(e, tau, bounds, sinks)
    t = torch.arange(n)[:, None]
    start, stop = (run[:, :, None] for run in runs)
    assert all(run.dtype == torch.int32 for run in runs)
    assert torch.equal((t >= start) & (t < stop), pairs)
    assert pairs.any() or n < 10
    columns = torch.randn(batch, groups, n, generator=draw)
    rows = torch.randn(batch, heads, n, generator=draw)
    de = kernels.score_gradient(columns, rows, runs, changes)
    members = pairs.sum(3).clamp(min=1)
    mean = rows.double().unflatten(1, (groups, group)).sum(2) / members
    wanted = columns.double() - (pairs * mean[..., None]).sum(2)
    torch.testing.assert_close(de, wanted, atol=1e-11, rtol=0)
    assert torch.equal(de, kernels.score_gradient(columns, rows, runs, changes))


def test_a_gradient_that_is_no_number_stays_in_its_own_row():
    e = torch.linspace(0, 1, 40).double().repeat(1, 2, 1)
    tau = torch.full_like(e, 0.5)
    shape = geometry((1, 2, 40, 1), (1, 2, 40, 1), e.device)
    runs, changes = kernels.interior_runs(e, tau, WINDOW, shape, 0)
    rows = torch.ones(1, 2, 40)
    rows[0, 0, 20] = torch.nan
    de = kernels.score_gradient(torch.ones(1, 2, 40), rows, runs, changes)
    assert de[0, 0].isnan().any() and de[0, 1].isfinite().all()
