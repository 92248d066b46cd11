"""The budget, map and slope of each KV head, from errors on held-out documents."""

from __future__ import annotations

import numpy as np
import torch

from sparsek_cli.conversion.calibrate.head_budgets.by_error import allot
from sparsek_cli.conversion.calibrate.head_budgets.by_threshold import FutureAttention
from sparsek_cli.conversion.calibrate.head_budgets.choice import Choice
from sparsek_cli.conversion.calibrate.scorers.linear import Map
from sparsek_cli.conversion.calibrate.scorers.mlp import MlpMap
from sparsek_cli.conversion.planned import Plan
from sparsek_cli.conversion.write import Scorer

Candidate = tuple[str, float]


class HeldOut:
    """What the held-out sequences say about one layer; text and answer rows apart.

    Attributes:
        maps: the layer's candidate maps. candidates: [C][G] pairs (map, slope in units).
        unit: a slope of 1 per token. errors: sums [2, C, L, G]. stream: sums [2] of the residual
            stream's energy. rows: counts [2].
        worth: [2] what the whole model loses per error, nats; see sensitivity/divergence.py.
        attention: by document, what will be looked at; see by_threshold.py.
    """

    def __init__(
        self,
        maps: dict[str, Map],
        candidates: list[list[Candidate]],
        unit: float,
        sizes: int,
        groups: int,
    ):
        self.maps, self.candidates, self.unit = maps, candidates, unit
        self.errors = np.zeros((2, len(candidates), sizes, groups))
        self.stream = np.zeros(2)
        self.rows = np.zeros(2)
        self.worth = np.ones(2)
        self.attention: list[FutureAttention] = []

    def add(self, errors: torch.Tensor, stream: torch.Tensor, answer: torch.Tensor) -> None:
        for kind, chosen in enumerate((~answer, answer)):
            self.errors[kind] += errors[..., chosen].sum(-1).double().cpu().numpy()
            self.stream[kind] += float(stream[chosen].sum())
            self.rows[kind] += int(chosen.sum())

    def relative(self) -> np.ndarray:
        """[2, C, L, G]: mean errors per row, relative to the residual stream's energy.

        A layer normalises its input, so that what counts is the error's share of the stream.
        """
        rows = np.maximum(self.rows, 1).reshape(2, 1, 1, 1)
        return self.errors / rows / (self.stream.sum() / self.rows.sum())

    def combined(self, answer_weight: float) -> np.ndarray:
        """[C, L, G]: what errors in text and, weighted, those at answers are worth."""
        text, answers = self.relative() * self.worth.reshape(2, 1, 1, 1)
        return text + answer_weight * answers

    def choose(
        self, topk: np.ndarray, sizes: tuple[int, ...], answer_weight: float
    ) -> tuple[Choice, np.ndarray]:
        """Each head's best candidate with topk [G] slots; and their errors [2], all heads'.

        Errors are those of the nearest of `sizes`.
        """
        heads = np.arange(len(topk))
        distance = np.abs(np.log1p(topk)[:, None] - np.log1p(np.asarray(sizes)))
        levels = distance.argmin(1)
        best = self.combined(answer_weight)[:, levels, heads].argmin(0)
        picked = [self.candidates[b][head] for head, b in enumerate(best)]
        maps, slopes = zip(*picked, strict=True)
        choice = Choice(
            maps, tuple(slope * self.unit for slope in slopes), tuple(int(k) for k in topk)
        )
        return choice, self.relative()[:, best, levels, heads].sum(-1)


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


def decide(
    plan: Plan, layers: list[HeldOut], shares: np.ndarray, answer_weight: float
) -> list[Choice]:
    """Each head's best map and slope with its share, [layers, G] selected pairs."""
    sizes = sizes_of(plan)
    return [
        layer.choose(topk, sizes, answer_weight)[0]
        for layer, topk in zip(layers, shares, strict=True)
    ]


def scorers_of(layers: list[HeldOut], choices: list[Choice]) -> list[Scorer]:
    """What is written: each head's row of the map that it got."""
    return [_scorer(layer.maps, choice) for layer, choice in zip(layers, choices, strict=True)]


def _scorer(maps: dict[str, Map], choice: Choice) -> Scorer:
    taken = [maps[name] for name in choice.maps]
    linear = [map_.linear if isinstance(map_, MlpMap) else map_ for map_ in taken]
    parts = {
        "weight": torch.stack([map_.weight[head] for head, map_ in enumerate(linear)]),
        "bias": torch.stack([map_.bias[head] for head, map_ in enumerate(linear)]),
    }
    if isinstance(taken[0], MlpMap):
        parts["hidden_weight"], parts["hidden_bias"] = taken[0].hidden.weight, taken[0].hidden.bias
        parts["out_weight"] = torch.stack([map_.out[head] for head, map_ in enumerate(taken)])
    arrays = {name: tensor.float().cpu().numpy() for name, tensor in parts.items()}
    return Scorer(slopes=np.asarray(choice.slopes, dtype=np.float32), topk=choice.topk, **arrays)
