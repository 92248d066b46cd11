"""Per-head budgets by one threshold on the attention that pairs will get from later queries.

Of the attention that pairs will get, in every head of every layer, the largest values are taken
until all slots are spent, so that a head gets as many slots as pairs of it lie above the threshold:
all of the context where a head looks things up, none where it never does. Averaged over documents
these shares are constants of the model (method.md section 5).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class FutureAttention:
    """What is looked at in one layer while one document is told again.

    Attributes:
        told: [G, n] log of the largest attention that each of n pairs gets.
        candidates: pairs of the whole document that may be selected at its end.
    """

    told: np.ndarray
    candidates: int


def threshold_shares(layers: list[list[FutureAttention]], topk: int) -> np.ndarray:
    """Selected pairs of each head, [layers, G] int64, `topk` on average.

    Args:
        layers: of each layer what was seen in each document.
    """
    documents = [
        _shares_of([layer[number] for layer in layers], topk) for number in range(len(layers[0]))
    ]
    return _rounded(np.mean(documents, axis=0), topk)


def _shares_of(layers: list[FutureAttention], topk: int) -> np.ndarray:
    """[layers, G] float64, of one document."""
    attention = np.stack([layer.told for layer in layers])
    candidates, pairs = layers[0].candidates, attention.shape[-1]
    taken = min(attention.size, round(topk / candidates * attention.size))
    best = np.argpartition(-attention.ravel(), max(taken - 1, 0))[:taken]
    heads = attention.size // pairs
    counts = np.bincount(best // pairs, minlength=heads).reshape(attention.shape[:2])
    return counts / pairs * candidates


def _rounded(shares: np.ndarray, topk: int) -> np.ndarray:
    """Whole numbers, the total not above `topk` per head."""
    total = topk * shares.size
    shares = shares * min(1.0, total / max(shares.sum(), 1e-9))
    whole = np.floor(shares).astype(np.int64)
    left = max(0, min(total, round(shares.sum())) - whole.sum())
    order = np.argsort(-(shares - whole), axis=None, kind="stable")[:left]
    whole.ravel()[order] += 1
    return whole
