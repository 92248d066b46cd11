"""Effective scores inside kernels; the twin of `sparsek_kernels.scores`."""

import triton
import triton.language as tl

from sparsek_kernels.scores import LARGEST

_LARGEST = tl.constexpr(LARGEST)


@triton.jit
def comparable(score):
    """float64 scores as `scores.comparable` makes them: NaN as -inf, +inf as the largest number."""
    return tl.where(score > -float("inf"), tl.minimum(score, _LARGEST), -float("inf"))


@triton.jit
def effective_score(score, slope, place, SLOPED: tl.constexpr):
    """u + slope * place of any dtypes, in float64, and comparable.

    Where it is compiled fused multiply-add must be off: all kernels find the same bits.
    """
    score = score.to(tl.float64)
    if SLOPED:
        score += slope.to(tl.float64) * place.to(tl.float64)
    return comparable(score)
