"""Errors of a layer's candidates on held-out documents, and each head's best of them."""

from __future__ import annotations

import numpy as np
import torch

from sparsek_cli.conversion.calibrate.head_budgets.by_threshold import FutureAttention
from sparsek_cli.conversion.calibrate.head_budgets.choice import Choice
from sparsek_cli.conversion.calibrate.scorers.linear import Map

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
