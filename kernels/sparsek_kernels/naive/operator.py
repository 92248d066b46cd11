"""The operator from its definition: the sum at every knot, autograd through the closed form."""

from __future__ import annotations

import torch
from torch import Tensor


def naive_threshold(z: Tensor, k: int) -> Tensor:
    """tau [...] of z [..., n] in float64, differentiable; -inf when k >= n. O(n^2) memory.

    The smallest tau with sum clip(z - tau, 0, 1) = k. Its derivative takes as interior
    {z > tau, z - 1 < tau}: on a knot that is one choice among several.
    """
    z = z.to(torch.float64)
    n = z.shape[-1]
    if k >= n:
        return z.new_full(z.shape[:-1], -torch.inf)
    with torch.no_grad():
        knots = torch.cat([z, z - 1], -1).sort(-1).values
        mass = (z[..., None, :] - knots[..., None]).clamp(0, 1).sum(-1)
        # First knot where the sum is down to k; 1e-9 absorbs the rounding of an exact hit.
        at = (mass > k + 1e-9).sum(-1, keepdim=True)
        right, left = knots.gather(-1, at), knots.gather(-1, (at - 1).clamp(min=0))
        hit = (mass.gather(-1, at) >= k - 1e-9).squeeze(-1)
        middle = torch.where(hit[..., None], right, (left + right) / 2)
        interior, full = (z > middle) & (z - 1 < middle), (z - 1 >= middle).sum(-1)
        count = interior.sum(-1)
    tau = (torch.where(interior, z, 0.0).sum(-1) + full - k) / count.clamp(min=1)
    value = torch.where(hit, right.squeeze(-1), tau.detach())
    return torch.where(count > 0, tau - tau.detach(), 0.0) + value


def naive_gates(z: Tensor, tau: Tensor) -> Tensor:
    """clip(z - tau, 0, 1), with the derivative of the interior alone; tau broadcasts."""
    z = z.to(torch.float64)
    interior = (z > tau) & (z - 1 < tau)
    return torch.where(interior, z - tau, (z.detach() - tau.detach()).clamp(0, 1))


def naive_sparsek(z: Tensor, k: int) -> Tensor:
    """The operator, differentiated by autograd alone."""
    return naive_gates(z, naive_threshold(z, k)[..., None])
