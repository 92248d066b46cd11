"""The decision on per-head budgets: proposals, compared by what the whole sparse model loses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from sparsek_cli.conversion.calibrate.effort import Effort
from sparsek_cli.conversion.calibrate.head_budgets.by_error import choices_with, shares_by_errors
from sparsek_cli.conversion.calibrate.head_budgets.by_threshold import threshold_shares
from sparsek_cli.conversion.calibrate.head_budgets.choice import Choice
from sparsek_cli.conversion.calibrate.head_budgets.held_out import HeldOut
from sparsek_cli.conversion.calibrate.head_budgets.refine import moved_shares, resized
from sparsek_cli.conversion.calibrate.sensitivity.divergence import (
    Whole,
    chosen_attention,
    window_attention,
)
from sparsek_cli.conversion.calibrate.sensitivity.gradient import Gradients, NoGradients
from sparsek_cli.conversion.planned import Plan

# What an error at an answer counts against one in text when slots are shared out by errors: losses
# of single layers do not quite add up to the whole model's, so several are tried, and means of two.
_ANSWER_WEIGHTS = (3.0, 0.1, 30.0, 1.0, 10.0)
_MEANS = ((0.1, 10.0), (0.1, 30.0))
# The weight that goes with the threshold: for maps and slopes, and in the mean of both.
_WITH_THRESHOLD = 3.0
_REFINED = ", refined"
# What a proposal that hardly weighs answers may lose there beyond the best one, as a share of what
# a window loses and at even weights: a few lost facts drown in the mean of what is told again, and
# refinement does not bring them back.
_LOST_FACTS = 0.03


def decide(
    plan: Plan,
    layers: list[HeldOut],
    whole: Whole,
    gradients: Gradients,
    effort: Effort,
    advance: Callable[[int], Any],
) -> tuple[list[Choice], dict[str, Any]]:
    """The decision whose whole model loses least, recall and text weighed; and a report.

    Proposals are compared, and the best one is refined (refine.py) as long as that helps. One that
    loses more text than a plain window of the same slots is taken only if all do.

    Args:
        effort: how many are run, the likeliest first.
        advance: called with 1 after each pass; there are at most `effort.passes`.
    """
    compared = _Comparison(plan, layers, whole, advance)
    for name, answer_weight, shares in _proposals(plan, layers):
        if len(compared.tried) == effort.proposals:
            break
        compared.run(choices_with(plan, layers, shares, answer_weight), name, answer_weight)
    reason = None
    for _ in range(effort.refinements):
        try:
            moved = moved_shares(plan, layers, compared.choices, gradients, compared.nats)
        except NoGradients as error:
            reason = str(error)
            break
        if not _refine(compared, moved):
            break
    choices, report = compared.outcome()
    return choices, report | {"not_refined": reason}


class _Comparison:
    """Decisions and what their whole models lose; `window`: [2], what a plain window does."""

    def __init__(
        self, plan: Plan, layers: list[HeldOut], whole: Whole, advance: Callable[[int], Any]
    ):
        self.plan, self.layers = plan, layers
        self._whole, self._advance = whole, advance
        self.decisions: list[list[Choice]] = []
        self.tried: list[dict[str, Any]] = []
        self.window = whole.divergence(dict.fromkeys(plan.sparse_layers, window_attention(plan)))
        advance(1)

    @property
    def best(self) -> int:
        """Number of the decision to take."""
        return self._best(self.plan.calibration.recall)

    @property
    def choices(self) -> list[Choice]:
        """The decision to take."""
        return self.decisions[self.best]

    @property
    def nats(self) -> np.ndarray:
        """[2], what a nat of text and of answers counts."""
        return worth(self.plan, self.window)

    def run(self, choices: list[Choice], name: str, answer_weight: float) -> None:
        """Measures a decision, unless it was measured: several weights may lead to one."""
        if choices in self.decisions:
            return
        attend = {
            number: chosen_attention(self.plan, layer.maps, choice)
            for number, layer, choice in zip(
                self.plan.sparse_layers, self.layers, choices, strict=True
            )
        }
        text, answers = self._whole.divergence(attend)
        self._advance(1)
        self.decisions.append(choices)
        self.tried.append(
            {
                "shares": name,
                "answer_weight": answer_weight,
                "text_loss": float(text),
                "answer_loss": float(answers),
            }
        )

    def outcome(self) -> tuple[list[Choice], dict[str, Any]]:
        """The decision to take, and the report."""
        choices = self.choices
        report = {
            **self.tried[self.best],
            "recall": self.plan.calibration.recall,
            "window_text_loss": float(self.window[0]),
            "window_answer_loss": float(self.window[1]),
            "recall_alone": self.tried[self._best(1.0)],
            "text_alone": self.tried[self._best(0.0)],
            "tried": self.tried,
            "layers": [
                {
                    "map": list(choice.maps),
                    "slope": [round(slope / layer.unit, 6) for slope in choice.slopes],
                    "topk": list(choice.topk),
                    "worth": [float(worth) for worth in layer.worth],
                }
                for layer, choice in zip(self.layers, choices, strict=True)
            ],
        }
        return choices, report

    def _best(self, recall: float) -> int:
        return best_of(self.tried, self.window, recall)


def worth(plan: Plan, window: np.ndarray) -> np.ndarray:
    """[2], what a nat of text and of answers counts; `window`: what a plain one loses of both."""
    recall = plan.calibration.recall
    return np.array([1 - recall, recall]) / np.maximum(window, 1e-9)


def _refine(compared: _Comparison, moved: list[np.ndarray]) -> bool:
    """Runs the best decision with these slots, each [layers, G]; whether one was better."""
    before = compared.best
    choices, row = compared.decisions[before], compared.tried[before]
    name = row["shares"].removesuffix(_REFINED) + _REFINED
    for shares in moved:
        refined = [resized(*pair) for pair in zip(choices, shares, strict=True)]
        compared.run(refined, name, row["answer_weight"])
    return compared.best != before


def _proposals(plan: Plan, layers: list[HeldOut]) -> list[tuple[str, float, np.ndarray]]:
    """Shares to compare, those that win most often first.

    Their name, the weight of answers for maps and slopes, and selected pairs [layers, G].
    """
    even = np.full((len(layers), plan.geometry.kv_heads), plan.topk)
    last = [("even", _WITH_THRESHOLD, even)]
    if not plan.calibration.per_head:
        return last
    shares = {weight: shares_by_errors(plan, layers, weight) for weight in _ANSWER_WEIGHTS}
    errors = [("errors", weight, share) for weight, share in shares.items()]
    means = []
    for low, high in _MEANS:
        mean = (shares[low] + shares[high]) // 2
        means.append((f"mean of errors {low:g} and {high:g}", high, mean))
    if all(layer.attention for layer in layers):
        found = threshold_shares([layer.attention for layer in layers], plan.topk)
        mean = (found + shares[_WITH_THRESHOLD]) // 2
        means.append(("mean of threshold and errors", _WITH_THRESHOLD, mean))
    return [*errors[:1], *means[:1], *errors[1:3], *means[2:], *errors[3:], *means[1:2], *last]


def best_of(tried: list[dict[str, Any]], window: np.ndarray, recall: float) -> int:
    """Which to take; `window` is what a plain window loses in text and at answers.

    Recall first: what weighs answers less than text and loses more there than another proposal, by
    more than `_LOST_FACTS` at this weight of recall, is not taken however good its text is.
    """
    numbers = [n for n, row in enumerate(tried) if row["text_loss"] <= window[0]]
    numbers = numbers or list(range(len(tried)))
    proposed = [n for n in numbers if not tried[n]["shares"].endswith(_REFINED)]
    if recall and proposed:
        least = min(tried[n]["answer_loss"] for n in proposed)
        most = least + (1 - recall) / recall * _LOST_FACTS * window[1]
        light = {n for n in proposed if tried[n]["answer_weight"] < 1}
        kept = [n for n in numbers if n not in light or tried[n]["answer_loss"] <= most]
        numbers = kept or numbers

    def lost(n: int) -> float:
        text, answers = (tried[n][kind] for kind in ("text_loss", "answer_loss"))
        share = text / max(window[0], 1e-9), answers / max(window[1], 1e-9)
        return (1 - recall) * share[0] + recall * share[1]

    return min(numbers, key=lost)
