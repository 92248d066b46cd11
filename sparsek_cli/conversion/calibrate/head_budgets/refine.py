"""Per-head budgets moved in small steps, by what the sparse model itself would lose or gain."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from sparsek_cli.conversion.calibrate.head_budgets.by_error import allot, sizes_of
from sparsek_cli.conversion.calibrate.head_budgets.choice import Choice
from sparsek_cli.conversion.calibrate.head_budgets.held_out import HeldOut
from sparsek_cli.conversion.calibrate.sensitivity.divergence import chosen_attention
from sparsek_cli.conversion.calibrate.sensitivity.gradient import Gradients
from sparsek_cli.conversion.planned import Plan

# Sizes that a head is thought to have, of its own: beyond them a gradient says nothing.
_FACTORS = np.array([0.5, 0.8, 1.0, 1.25, 2.0])
_OWN = 2  # the one it has
# Parts of the way that are tried, where both are asked and where the gradient alone is.
_BELIEVED_BY_BOTH = (1.0, 0.5)
_BY_GRADIENT = (0.25, 0.1)
WAYS = len(_BELIEVED_BY_BOTH) + len(_BY_GRADIENT)
# Of topk, what a head of few keys may get beyond those multiples: at most, of none at all.
_GRAIN = 0.25


def moved_shares(
    plan: Plan, layers: list[HeldOut], choices: list[Choice], gradients: Gradients, nats: np.ndarray
) -> list[np.ndarray]:
    """Selected pairs of each head, [layers, G], that may lose less: several ways to move slots.

    A gradient sees what a head could add, and hardly what it holds already: where a token is
    predicted for certain the loss is flat. Errors against dense attention see that. So one way
    believes a change to be as bad as the worse of both says, and goes further; the other follows
    the gradient alone, in small steps.

    Args:
        choices: the decision that is changed; maps and slopes stay.
        nats: [2], what a nat of text and of answers counts.
    """
    shares = np.array([choice.topk for choice in choices])
    sizes = _other_sizes(plan, shares)
    own, others = {}, {}
    for place, number in enumerate(plan.sparse_layers):
        maps = layers[place].maps
        own[number] = chosen_attention(plan, maps, choices[place])
        others[number] = [
            chosen_attention(plan, maps, resized(choices[place], sizes[place, :, n]))
            for n in range(len(_FACTORS))
            if n != _OWN
        ]
    seen = np.insert(gradients.changes(own, others, nats), _OWN, 0.0, axis=-1)
    expected = np.stack(
        [_expected(plan, layer, size, nats) for layer, size in zip(layers, sizes, strict=True)]
    )
    expected -= expected[..., _OWN, None]
    ways = []
    for change, steps in ((np.maximum(seen, expected), _BELIEVED_BY_BOTH), (seen, _BY_GRADIENT)):
        target = _target(change, sizes, plan.topk * shares.size)
        ways += [(shares + step * (target - shares)).astype(np.int64) for step in steps]
    return ways


def _target(change: np.ndarray, sizes: np.ndarray, total: int) -> np.ndarray:
    """[layers, G], the sizes whose changes [layers, G, L] are best together."""
    flat = sizes.reshape(-1, sizes.shape[-1])
    taken = allot(change.reshape(flat.shape), flat, total)
    return flat[np.arange(len(flat)), taken].reshape(sizes.shape[:-1])


def resized(choice: Choice, topk: np.ndarray) -> Choice:
    """The same maps and slopes with topk [G] selected keys."""
    return replace(choice, topk=tuple(int(size) for size in topk))


def _other_sizes(plan: Plan, shares: np.ndarray) -> np.ndarray:
    """[layers, G, L] ascending: less and more than each head has."""
    most = sizes_of(plan)[-1]
    sizes = shares[..., None] * _FACTORS + _GRAIN * plan.topk * (_FACTORS - 1)
    return sizes.clip(0, np.maximum(most, shares)[..., None]).astype(np.int64)


def _expected(plan: Plan, layer: HeldOut, sizes: np.ndarray, nats: np.ndarray) -> np.ndarray:
    """What errors of one layer's heads with these sizes [G, L] are worth, [G, L]."""
    at = np.log1p(sizes_of(plan))
    weights = (nats * layer.worth).reshape(2, 1, 1, 1)
    curves = np.minimum.accumulate((layer.relative() * weights).sum(0).min(0), axis=0)
    return np.stack(
        [np.interp(np.log1p(own), at, curves[:, head]) for head, own in enumerate(sizes)]
    )
