"""tau of short calls: that of the PyTorch backend, and of the ways that longer calls take."""

import pytest
import torch
from sparsek_kernels import sparsek_attention
from sparsek_kernels.dispatch import as_if_long
from sparsek_kernels.pytorch import thresholds
from sparsek_kernels.triton.geometry import geometry
from sparsek_kernels.triton.short.blocks import BLOCK
from sparsek_kernels.triton.short.thresholds import BLOCKS, short_thresholds
from sparsek_kernels.triton.thresholds.descent import prefix_thresholds

TOPK, WINDOW, SINKS = (5, 40), 3, 2
KINDS = ("normal", "ties", "equal", "offset", "wide", "narrow", "holes")


def scores_of(kind, n, batch=1, device="cpu"):
    draw = torch.Generator().manual_seed(n)
    scores = torch.randn(batch, 2, n, generator=draw, dtype=torch.float64)
    if kind == "ties":
        scores = scores.mul(2).round() / 2
    elif kind == "equal":
        scores = torch.full_like(scores, 0.25)
    elif kind == "offset":
        scores = scores.float().double() + 1e4
    elif kind == "wide":
        scores = scores * 40
    elif kind == "narrow":
        scores = scores * 1e-4
    elif kind == "holes":
        scores[torch.rand(scores.shape, generator=draw) < 0.3] = -torch.inf
        scores[torch.rand(scores.shape, generator=draw) < 0.1] = torch.nan
    return scores.to(device)


def shape_of(scores, bounds=None):
    batch, heads, n = scores.shape
    bounds = None if bounds is None else torch.tensor(bounds, device=scores.device).int()
    return geometry((batch, heads, n, 1), (batch, heads, n, 1), scores.device, bounds)


def agree(tau, wanted, candidates, topk, starts):
    """Compares tau [G, N] of queries whose documents begin at `starts` [N].

    On a stretch of solutions it is the highest, to the bit, at which no key is interior.
    """
    n = tau.shape[1]
    t, j = torch.arange(n)[:, None], torch.arange(n)
    there = (j >= starts[:, None]) & (j <= t - WINDOW) & (candidates > -torch.inf)[:, None]
    for head, k in enumerate(topk):
        u = candidates[head].where(there[head], -torch.inf).sort(descending=True).values
        fits = there[head].sum(1) <= k if k else torch.ones(n, dtype=torch.bool)
        assert (tau[head, fits] == -torch.inf).all()
        if fits.all():
            continue
        of = ~fits
        least, next_one, found, near = u[of, k - 1], u[of, k], tau[head, of], wanted[head, of]
        apart = least - next_one >= 1
        assert torch.equal(found[apart], least[apart] - 1)
        close = (found - near).abs() < 1e-12 * near.abs().clamp(min=1)
        assert close[~apart].all()


def check(kind, n, topk=TOPK):
    scores = scores_of(kind, n)
    tau = short_thresholds(scores, topk, WINDOW, shape_of(scores), SINKS)[0]
    candidates = scores[0].nan_to_num(nan=-torch.inf, neginf=-torch.inf)
    candidates[:, :SINKS] = -torch.inf
    found = thresholds.prefix_thresholds(candidates, torch.tensor(topk))
    wanted = torch.full_like(tau, -torch.inf)
    wanted[:, WINDOW:] = found[:, : max(0, n - WINDOW)]
    agree(tau, wanted, candidates, topk, torch.zeros(n))


@pytest.mark.interpret
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [2, 63, BLOCK, BLOCK + 1, 300])
def test_thresholds_equal_those_of_the_pytorch_backend(kind, n):
    check(kind, n)


@pytest.mark.interpret
@pytest.mark.parametrize("kind", ["ties", "wide", "holes"])
def test_blocks_that_are_searched_together(kind):
    check(kind, (2 * BLOCKS + 1) * BLOCK + 5, (0, 150))


@pytest.mark.interpret
@pytest.mark.parametrize("kind", ["normal", "ties", "wide"])
@pytest.mark.parametrize("bounds", [[0, 1, 90, 90, 400, 530], [0, 128, 256, 600]])
def test_documents(kind, bounds):
    """Of up to three blocks, two of which are searched together."""
    scores = scores_of(kind, bounds[-1])
    shape = shape_of(scores, bounds)
    tau = short_thresholds(scores, TOPK, WINDOW, shape, SINKS)[0]
    wanted = prefix_thresholds(scores, TOPK, WINDOW, shape, SINKS)[0]
    candidates, starts = scores[0].clone(), torch.zeros(bounds[-1])
    for first, stop in zip(bounds, bounds[1:], strict=False):
        starts[first:stop] = first
        candidates[:, first : min(first + SINKS, stop)] = -torch.inf
    agree(tau, wanted, candidates, TOPK, starts)


@pytest.mark.interpret
@pytest.mark.parametrize("gate", ["straight_through", "log"])
def test_gradients_of_both_ways(gate):
    draw = torch.Generator().manual_seed(1)
    q = torch.randn(2, 4, 200, 16, generator=draw)
    k, v = (torch.randn(2, 2, 200, 16, generator=draw) for _ in range(2))
    scores = torch.randn(2, 2, 200, generator=draw, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (q, k, v, scores)]

    def gradients():
        options = dict(topk=(20, 3), window=7, sinks=2, gate=gate, backend="triton")
        out = sparsek_attention(*inputs, **options)
        return torch.autograd.grad(out.square().sum(), inputs)

    found = gradients()
    with as_if_long():
        expected = gradients()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "n, bounds", [(4096, None), (9000, None), (9000, [0, 1, 4000, 4000, 9000])]
)
def test_real_lengths(kind, n, bounds):
    scores = scores_of(kind, n, device="cuda")
    shape, topk = shape_of(scores, bounds), (1024, 300)
    found = [short_thresholds(scores, topk, 128, shape, 4) for _ in range(2)]
    assert torch.equal(*found)
    expected = prefix_thresholds(scores, topk, 128, shape, 4)
    there = found[0].isfinite()
    if kind != "holes":  # of which a long call makes numbers at which every gate is 1
        assert torch.equal(there, expected.isfinite())
    torch.testing.assert_close(found[0][there], expected[there], rtol=1e-9, atol=1e-9)
