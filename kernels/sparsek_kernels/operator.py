"""The SparseK operator: Euclidean projection onto {0 <= p <= 1, sum p = k}."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def threshold(scores: Tensor, k: int) -> Tensor:
    """Smallest tau with sum clip(z - tau, 0, 1) <= k; -inf when k >= n (derived, exact sort).

    Args:
        scores: [..., n] floating; computed in float64, centred, so that an offset costs nothing.
        k: number of elements to keep, >= 1.

    Returns:
        [...] float64. Where tau is not unique (a gap >= 1 at rank k) the smallest one.
    """
    z = scores.to(torch.float64)
    n = z.shape[-1]
    if k >= n:
        return z.new_full(z.shape[:-1], -torch.inf)
    # Subtracting an integer leaves differences of float32 scores exact.
    centre = z.amax(-1, keepdim=True).floor()
    z = (z - centre).reshape(-1, n).sort(-1).values
    low = z - 1
    suffix = torch.cat([z.flip(-1).cumsum(-1).flip(-1), z.new_zeros(z.shape[0], 1)], -1)
    knots = torch.cat([z, low], -1).sort(-1).values
    above = torch.searchsorted(z, knots, right=True)
    full = torch.searchsorted(low, knots)
    interior_sum = suffix.gather(-1, above) - suffix.gather(-1, full)
    mass = interior_sum - (full - above) * knots + (n - full)
    # The crossing lies in the segment that ends at the first knot with mass <= k.
    segment = ((mass > k).sum(-1, keepdim=True) - 1).clamp(min=0)
    left = knots.gather(-1, segment)
    above = torch.searchsorted(z, left, right=True)
    full = torch.searchsorted(low, left, right=True)
    interior_sum = suffix.gather(-1, above) - suffix.gather(-1, full)
    tau = (interior_sum + (n - full) - k) / (full - above).clamp(min=1)
    return (tau.reshape(centre.shape) + centre).squeeze(-1)


class _SparseK(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores: Tensor, k: int) -> Tensor:
        tau = threshold(scores, k)[..., None]
        wide = scores.to(torch.float64)
        ctx.save_for_backward((wide > tau) & (wide - 1 < tau))
        return (wide - tau).clamp(0, 1).to(scores.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (interior,) = ctx.saved_tensors
        wide = torch.where(interior, grad.to(torch.float64), 0.0)
        mean = wide.sum(-1, keepdim=True) / interior.sum(-1, keepdim=True).clamp(min=1)
        return torch.where(interior, wide - mean, 0.0).to(grad.dtype), None


def sparsek(scores: Tensor, k: int) -> Tensor:
    """argmin ||p - scores||^2 over {0 <= p <= 1, sum p = k}, on the last dimension.

    arXiv 2406.16747, the SparseK operator; p_j = clip(z_j - tau, 0, 1). Its VJP (derived) is
    dz = dp - mean over I of dp on the interior I = {z > tau and z - 1 < tau}, zero elsewhere.
    k = 1 is sparsemax; k >= n gives ones.

    Args:
        scores: [..., n] floating tensor with n >= 1, finite.
        k: an integer >= 1.

    Returns:
        [..., n], the dtype of `scores`; differentiable once.

    Raises:
        TypeError: scores are not floating, or k is not an integer.
        ValueError: k < 1, or no last dimension.
    """
    if not torch.is_tensor(scores) or not scores.is_floating_point():
        raise TypeError("sparsek: scores must be a floating-point tensor")
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"sparsek: k must be an integer, got {type(k).__name__}")
    if k < 1:
        raise ValueError(f"sparsek: k must be at least 1, got {k}")
    if scores.dim() == 0 or scores.shape[-1] == 0:
        raise ValueError(f"sparsek: the last dimension is empty, shape {tuple(scores.shape)}")
    return _SparseK.apply(scores, k)
