"""What each KV head gets: its share of the slots, its map and its slope."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sparsek_cli.conversion.calibrate.allot import allot
from sparsek_cli.conversion.calibrate.fit import Map
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
        unit: a slope of 1 per token. errors: sums [2, C, L, G]. energy: sums [2, G] of the
            dense output's. stream: sums [2] of the residual stream's. rows: counts [2].
        answer_weight: how much an error at an answer counts against one in text.
    """

    def __init__(
        self,
        maps: dict[str, Map],
        candidates: list[list[Candidate]],
        unit: float,
        sizes: int,
        groups: int,
        answer_weight: float,
    ):
        self.maps, self.candidates, self.unit = maps, candidates, unit
        self.answer_weight = answer_weight
        self.errors = np.zeros((2, len(candidates), sizes, groups))
        self.energy = np.zeros((2, groups))
        self.stream = np.zeros(2)
        self.rows = np.zeros(2)

    def add(
        self,
        errors: torch.Tensor,
        energy: torch.Tensor,
        stream: torch.Tensor,
        answer: torch.Tensor,
    ) -> None:
        for kind, chosen in enumerate((~answer, answer)):
            self.errors[kind] += errors[..., chosen].sum(-1).double().cpu().numpy()
            self.energy[kind] += energy[:, chosen].sum(-1).double().cpu().numpy()
            self.stream[kind] += float(stream[chosen].sum())
            self.rows[kind] += int(chosen.sum())

    def relative(self, sums: np.ndarray) -> np.ndarray:
        """Sums [2, ...] as means per row, relative to the residual stream's energy.

        A layer normalises its input, so that what counts is the error's share of the stream.
        """
        rows = np.maximum(self.rows, 1).reshape(2, *[1] * (sums.ndim - 1))
        return sums / rows / (self.stream.sum() / self.rows.sum())

    def combined(self) -> np.ndarray:
        """[C, L, G]: error in text plus weighted error at answers."""
        text, answers = self.relative(self.errors)
        return text + self.answer_weight * answers


def sizes_of(plan: Plan) -> tuple[int, ...]:
    """The sizes of topk to compare; the mean alone where all heads get the same."""
    if plan.recipe.budgets == "uniform":
        return (plan.topk,)
    longest = plan.calibrate_length - plan.window - plan.sinks
    shares = {1.0, *plan.recipe.method.sizes}
    sizes = {max(1, round(share * plan.topk)) for share in shares}
    return tuple(sorted(size for size in sizes if size <= longest or size <= plan.topk))


def decide(plan: Plan, layers: list[HeldOut]) -> tuple[list[Choice], dict[str, Any]]:
    """Sizes for all heads, then each head's best map and slope at its size; and a report of it."""
    sizes, groups = sizes_of(plan), plan.geometry.kv_heads
    curves = np.stack([layer.combined() for layer in layers])  # [layers, C, L, G]
    smallest = curves.min(1).transpose(0, 2, 1).reshape(-1, len(sizes))
    taken = allot(smallest, sizes, plan.topk * len(smallest))
    mean = sizes.index(plan.topk)
    if smallest[np.arange(len(taken)), taken].sum() > smallest[:, mean].sum():
        taken = np.full(len(taken), mean)
    taken = taken.reshape(len(layers), groups)
    choices, rows = [], []
    for layer, levels in zip(layers, taken, strict=True):
        heads = np.arange(groups)
        best = layer.combined()[:, levels, heads].argmin(0)
        picked = [layer.candidates[b][head] for head, b in enumerate(best)]
        topk = [sizes[level] for level in levels]
        maps, slopes = zip(*picked, strict=True)
        choices.append(Choice(maps, tuple(slope * layer.unit for slope in slopes), tuple(topk)))
        rows.append(
            {
                "map": list(maps),
                "slope": list(slopes),
                "topk": topk,
                "error": layer.relative(layer.errors[:, best, levels, heads]),
                # The last candidate is a window, here with the mean number of slots.
                "window_error": layer.relative(layer.errors[:, -1, mean]),
                "energy": layer.relative(layer.energy),
            }
        )
    return choices, _report(rows, plan.recipe.method.answer_weight)


def linear_scorers(layers: list[HeldOut], choices: list[Choice]) -> list[Scorer]:
    """What is written: each head's row of the linear map that it got."""
    return [
        Scorer(
            weight=_float32([layer.maps[n].weight[g] for g, n in enumerate(choice.maps)]),
            bias=_float32([layer.maps[n].bias[g] for g, n in enumerate(choice.maps)]),
            slopes=np.asarray(choice.slopes, dtype=np.float32),
            topk=choice.topk,
        )
        for layer, choice in zip(layers, choices, strict=True)
    ]


def _float32(heads: list[torch.Tensor]) -> np.ndarray:
    return torch.stack(heads).float().cpu().numpy()


def _report(layers: list[dict[str, Any]], answer_weight: float) -> dict[str, Any]:
    """Totals over layers and heads, relative to the dense output's energy."""

    def total(key: str, weights: tuple[float, float]) -> float:
        return float(sum(np.dot(weights, layer[key].sum(-1)) for layer in layers))

    report: dict[str, Any] = {}
    kinds = {"": (1.0, answer_weight), "text_": (1.0, 0.0), "answer_": (0.0, 1.0)}
    for name, weights in kinds.items():
        energy = max(total("energy", weights), 1e-30)
        report[f"{name}error"] = total("error", weights) / energy
        report[f"{name}window_error"] = total("window_error", weights) / energy
    report["layers"] = [{key: layer[key] for key in ("map", "slope", "topk")} for layer in layers]
    return report
