"""Per-head budgets by output error: one total of slots, spent where the error falls most.

Heads that retrieve need many slots, local ones hardly any. With e_h(k) the smallest error of head
h at k slots, the sum of e_h(k_h) under a fixed sum of k_h is smallest where every head gains the
same from one slot more: for a price m per slot each head takes the k that minimises e_h(k) + m k,
and m is found by bisection (Lagrange; exact on the convex hull of the curves).
"""

from __future__ import annotations

import numpy as np

_BISECTIONS = 60


def allot(errors: np.ndarray, sizes: np.ndarray | tuple[int, ...], total: int) -> np.ndarray:
    """Index of each head's size.

    Args:
        errors: [heads, L], each head's smallest error at each size.
        sizes: the L sizes, ascending, or [heads, L], each head's own; the smallest of all heads
            together must not exceed `total`.
        total: slots to spend on all heads.

    Returns:
        [heads] int64, with sum of sizes <= total.
    """
    cost = np.broadcast_to(np.asarray(sizes, dtype=np.float64), errors.shape)
    heads = np.arange(len(errors))
    # More slots never hurt: what looks like it is noise of the sample.
    errors = np.minimum.accumulate(errors, axis=1)

    def take(price: float) -> np.ndarray:
        return (errors + price * cost).argmin(1)

    low, high = 0.0, 1.0
    while cost[heads, take(high)].sum() > total:
        high *= 4
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if cost[heads, take(middle)].sum() <= total else (middle, high)
    chosen = take(high)
    return _spend_the_rest(errors, cost, chosen, total)


def _spend_the_rest(
    errors: np.ndarray, cost: np.ndarray, chosen: np.ndarray, total: int
) -> np.ndarray:
    """Single steps up, the most useful per slot first, as long as one fits."""
    chosen = chosen.copy()
    heads = np.arange(len(chosen))
    while True:
        left = total - cost[heads, chosen].sum()
        following = np.minimum(chosen + 1, cost.shape[1] - 1)
        extra = cost[heads, following] - cost[heads, chosen]
        fits = (extra > 0) & (extra <= left)
        if not fits.any():
            return chosen
        gain = (errors[heads, chosen] - errors[heads, following]) / np.maximum(extra, 1)
        chosen[np.where(fits, gain, -np.inf).argmax()] += 1
