"""Inputs and measures shared by the kernel tests."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def relative_error():
    """|a - b| / |b|, with a floor so that two zero tensors agree."""

    def measure(a: torch.Tensor, b: torch.Tensor) -> float:
        a, b = a.detach().double(), b.detach().double()
        return ((a - b).norm() / (b.norm() + 1e-9)).item()

    return measure


@pytest.fixture
def make_inputs():
    """(q, k, v, scores) with gradients on, scores of one of several difficult kinds."""

    def make(
        n, *, batch=1, heads=2, groups=1, dim=4, kind="normal", dtype=torch.float64, seed=0,
        grad=True,
    ):  # fmt: skip
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        q, k, v = (normal(batch, h, n, dim) for h in (heads, groups, groups))
        scores = normal(batch, groups, n)
        if kind == "equal":
            scores = torch.full_like(scores, 0.25)
        elif kind == "ties":
            scores = scores.mul(1.5).round()
        elif kind == "offset":
            scores = scores + 1e4
        elif kind == "wide":
            scores = scores * 20
        elif kind == "rising":
            scores = scores + 0.05 * torch.arange(n)
        elif kind == "falling":
            scores = scores - 0.05 * torch.arange(n)
        tensors = [x.to(dtype) for x in (q, k, v, scores)]
        return [x.requires_grad_() for x in tensors] if grad else tensors

    return make
