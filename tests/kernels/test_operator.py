"""The operator: its constraints, its derivative, its limits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparsek_kernels import sparsek
from sparsek_kernels.naive.operator import naive_sparsek
from sparsek_kernels.operator import threshold

scores = st.lists(
    st.floats(-50, 50, allow_nan=False).map(lambda x: round(x, 4)), min_size=1, max_size=40
)
relaxed = settings(max_examples=60, deadline=None)


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@relaxed
@given(scores, st.integers(1, 45))
def test_result_is_feasible(values, k):
    p = sparsek(tensor(values), k)
    assert p.min() >= 0 and p.max() <= 1
    assert p.sum().item() == pytest.approx(min(k, len(values)), abs=1e-9)


@relaxed
@given(scores, st.integers(1, 45), st.randoms())
def test_permutation_equivariant(values, k, random):
    order = list(range(len(values)))
    random.shuffle(order)
    z = tensor(values)
    torch.testing.assert_close(sparsek(z[order], k), sparsek(z, k)[order])


@relaxed
@given(scores, st.integers(1, 45))
def test_monotone_in_the_scores(values, k):
    z = tensor(values)
    assert (sparsek(z, k)[z.argsort()].diff() >= 0).all()


@relaxed
@given(scores, st.integers(1, 40))
def test_feasible_points_stay(values, k):
    p = sparsek(tensor(values), k)
    k = min(k, len(values))
    torch.testing.assert_close(sparsek(p, k), p, atol=1e-9, rtol=0)


@relaxed
@given(scores, st.integers(1, 45), st.floats(-1e4, 1e4).map(round))
def test_offset_changes_nothing(values, k, offset):
    z = tensor(values)
    torch.testing.assert_close(sparsek(z + offset, k), sparsek(z, k), atol=1e-9, rtol=0)


@relaxed
@given(scores, st.integers(1, 45))
def test_agrees_with_bisection(values, k):
    z = tensor(values)
    torch.testing.assert_close(sparsek(z, k), naive_sparsek(z, k), atol=1e-9, rtol=0)


@pytest.mark.parametrize("k", [1, 2, 5, 9])
def test_gradcheck(k):
    torch.manual_seed(k)
    z = torch.randn(3, 2, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: sparsek(x, k), (z,), eps=1e-7, atol=1e-6)


@pytest.mark.parametrize("k", [1, 3, 20])
def test_gradient_agrees_with_autograd(k):
    torch.manual_seed(0)
    z = torch.randn(4, 50, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(z)
    ours = torch.autograd.grad((sparsek(z, k) * weight).sum(), z)[0]
    twin = torch.autograd.grad((naive_sparsek(z, k) * weight).sum(), z)[0]
    torch.testing.assert_close(ours, twin, atol=1e-12, rtol=1e-12)


def test_k_one_is_sparsemax():
    torch.manual_seed(1)
    z = torch.randn(7, 30, dtype=torch.float64)
    ordered = z.sort(descending=True).values
    rank = torch.arange(1, 31)
    size = (1 + rank * ordered > ordered.cumsum(-1)).sum(-1, keepdim=True)
    tau = (ordered.cumsum(-1).gather(-1, size - 1) - 1) / size
    torch.testing.assert_close(sparsek(z, 1), (z - tau).clamp(min=0))


@pytest.mark.parametrize("k", [4, 5, 100])
def test_enough_room_gives_ones_and_no_gradient(k):
    z = torch.randn(2, 4, requires_grad=True)
    p = sparsek(z, k)
    assert (p == 1).all()
    p.sum().backward()
    assert (z.grad == 0).all()


def test_gap_at_rank_k_is_no_division_by_zero():
    z = torch.tensor([3.0, 2.5, 1.0, 0.0], dtype=torch.float64, requires_grad=True)
    p = sparsek(z, 2)
    assert p.tolist() == [1, 1, 0, 0]
    (p * torch.tensor([1.0, 2, 3, 4])).sum().backward()
    assert torch.isfinite(z.grad).all()
    # The smallest of the many thresholds, so that thresholds of growing prefixes never decrease.
    assert threshold(z.detach(), 2).item() == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_keeps_its_dtype(dtype):
    z = torch.randn(3, 64).to(dtype)
    p = sparsek(z, 8)
    assert p.dtype == dtype
    torch.testing.assert_close(p.double(), sparsek(z.double(), 8), atol=4e-3, rtol=0)


def test_float32_survives_a_large_offset():
    z = torch.randn(100).mul(1024).round() / 1024
    shifted = (z.double() + 8192).float()
    torch.testing.assert_close(sparsek(shifted, 9), sparsek(z, 9), atol=1e-6, rtol=0)


def test_all_equal_share_alike():
    assert torch.allclose(sparsek(torch.zeros(10, dtype=torch.float64), 4), tensor([0.4] * 10))


def test_refusals():
    with pytest.raises(TypeError):
        sparsek(torch.arange(4), 2)
    with pytest.raises(TypeError):
        sparsek(torch.randn(4), 2.0)
    with pytest.raises(ValueError):
        sparsek(torch.randn(4), 0)
    with pytest.raises(ValueError):
        sparsek(torch.randn(4, 0), 1)
