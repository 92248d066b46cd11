"""Per-head budgets by output error: one total of slots, spent where the error falls most.

Heads that retrieve need many slots, local ones hardly any. With e_h(k) the smallest error of head
h at k slots, the sum of e_h(k_h) under a fixed sum of k_h is smallest where every head gains the
same from one slot more: for a price m per slot each head takes the k that minimises e_h(k) + m k,
and m is found by bisection (Lagrange; exact on the convex hull of the curves).
"""

from __future__ import annotations

import numpy as np

from sparsek_cli.conversion.calibrate.head_budgets.choice import Choice
from sparsek_cli.conversion.calibrate.head_budgets.held_out import HeldOut
from sparsek_cli.conversion.planned import Plan

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


def sizes_of(plan: Plan) -> tuple[int, ...]:
    """The sizes of topk to compare, up to all of a document; the mean alone if all get the same."""
    if not plan.calibration.per_head:
        return (plan.topk,)
    longest = max(plan.topk, plan.calibrate_length - plan.window - plan.sinks)
    sizes = {round(share * plan.topk) for share in (1.0, *plan.calibration.method.sizes)}
    return tuple(sorted({size for size in sizes if size < longest} | {plan.topk, longest}))


def shares_by_errors(plan: Plan, layers: list[HeldOut], answer_weight: float) -> np.ndarray:
    """Selected pairs of each head, [layers, G], where the output errors fall most."""
    sizes = sizes_of(plan)
    curves = np.stack([layer.combined(answer_weight) for layer in layers])  # [layers, C, L, G]
    smallest = curves.min(1).transpose(0, 2, 1)
    shape = smallest.shape[:2]
    taken = allot(smallest.reshape(-1, len(sizes)), sizes, plan.topk * shape[0] * shape[1])
    return np.asarray(sizes)[taken].reshape(shape)


def choices_with(
    plan: Plan, layers: list[HeldOut], shares: np.ndarray, answer_weight: float
) -> list[Choice]:
    """Each head's best map and slope with its share, [layers, G] selected pairs."""
    sizes = sizes_of(plan)
    return [
        layer.choose(topk, sizes, answer_weight)[0]
        for layer, topk in zip(layers, shares, strict=True)
    ]
