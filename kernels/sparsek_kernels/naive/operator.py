"""The operator from its definition: bisection for the pieces, autograd through the closed form."""

from __future__ import annotations

import torch
from torch import Tensor


def naive_threshold(z: Tensor, k: int) -> Tensor:
    """tau [...] of z [..., n] in float64, differentiable; -inf when k >= n."""
    z = z.to(torch.float64)
    n = z.shape[-1]
    if k >= n:
        return z.new_full(z.shape[:-1], -torch.inf)
    with torch.no_grad():
        low, high = z.amin(-1) - 1, z.amax(-1)
        for _ in range(200):
            middle = (low + high) / 2
            heavy = (z - middle[..., None]).clamp(0, 1).sum(-1) > k
            low, high = torch.where(heavy, middle, low), torch.where(heavy, high, middle)
        # Between the last two bracket ends lies at most one knot: look just left of it.
        interior = (z > low[..., None]) & (z - 1 <= low[..., None])
        full = (z - 1 > low[..., None]).sum(-1)
        count = interior.sum(-1)
    tau = (torch.where(interior, z, 0.0).sum(-1) + full - k) / count.clamp(min=1)
    return torch.where(count > 0, tau, high)


def naive_sparsek(z: Tensor, k: int) -> Tensor:
    """clip(z - tau, 0, 1), differentiated by autograd alone."""
    return (z.to(torch.float64) - naive_threshold(z, k)[..., None]).clamp(0, 1)
