"""What each KV head gets: its share of the slots, its map and its slope."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from sparsek_cli.conversion.calibrate.allot import allot
from sparsek_cli.conversion.calibrate.fit import Map
from sparsek_cli.conversion.calibrate.mlp import MlpMap
from sparsek_cli.conversion.plan import Plan
from sparsek_cli.conversion.write import Scorer

Candidate = tuple[str, float]


@dataclass(frozen=True)
class Choice:
    """What the KV heads of one layer get: names of maps, slopes per token, selected keys."""

    maps: tuple[str, ...]
    slopes: tuple[float, ...]
    topk: tuple[int, ...]


class HeldOut:
    """What the held-out sequences say about one layer; text and answer rows apart.

    Attributes:
        maps: the layer's candidate maps. candidates: [C][G] pairs (map, slope in units).
        unit: a slope of 1 per token. errors: sums [2, C, L, G]. stream: sums [2] of the residual
            stream's energy. rows: counts [2].
        worth: [2] what the whole model loses per error, nats; see whole.py.
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
        self, levels: np.ndarray, sizes: tuple[int, ...], answer_weight: float
    ) -> tuple[Choice, np.ndarray]:
        """Each head's best candidate at its size, levels [G]; and its errors [2], all heads'."""
        heads = np.arange(len(levels))
        best = self.combined(answer_weight)[:, levels, heads].argmin(0)
        picked = [self.candidates[b][head] for head, b in enumerate(best)]
        maps, slopes = zip(*picked, strict=True)
        choice = Choice(
            maps, tuple(slope * self.unit for slope in slopes), tuple(sizes[i] for i in levels)
        )
        return choice, self.relative()[:, best, levels, heads].sum(-1)


def sizes_of(plan: Plan) -> tuple[int, ...]:
    """The sizes of topk to compare; the mean alone where all heads get the same."""
    if plan.recipe.budgets == "uniform":
        return (plan.topk,)
    longest = plan.calibrate_length - plan.window - plan.sinks
    shares = {1.0, *plan.recipe.method.sizes}
    sizes = {max(1, round(share * plan.topk)) for share in shares}
    return tuple(sorted(size for size in sizes if size <= longest or size <= plan.topk))


def decide(
    plan: Plan, layers: list[HeldOut], answer_weight: float, *, per_head: bool = True
) -> list[Choice]:
    """Sizes for all heads, then each head's best map and slope at its size."""
    sizes, groups = sizes_of(plan), plan.geometry.kv_heads
    taken = np.full((len(layers), groups), sizes.index(plan.topk))
    if per_head:
        curves = np.stack([layer.combined(answer_weight) for layer in layers])  # [layers, C, L, G]
        smallest = curves.min(1).transpose(0, 2, 1).reshape(-1, len(sizes))
        taken = allot(smallest, sizes, plan.topk * len(smallest)).reshape(taken.shape)
    return [
        layer.choose(levels, sizes, answer_weight)[0]
        for layer, levels in zip(layers, taken, strict=True)
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
