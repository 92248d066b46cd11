"""Candidate allocations of per-head budgets, compared by what the whole sparse model loses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from sparsek_cli.conversion.calibrate.head_budgets.by_threshold import threshold_shares
from sparsek_cli.conversion.calibrate.head_budgets.choice import Choice
from sparsek_cli.conversion.calibrate.head_budgets.decide import (
    HeldOut,
    decide,
    shares_by_errors,
)
from sparsek_cli.conversion.calibrate.sensitivity.divergence import (
    Whole,
    chosen_attention,
    window_attention,
)
from sparsek_cli.conversion.planned import Plan

# What an error at an answer counts against one in text when slots are shared out by errors: losses
# of single layers do not quite add up to the whole model's, so several are tried, and means of two.
_ANSWER_WEIGHTS = (3.0, 0.1, 30.0, 1.0, 10.0)
_MEANS = ((0.1, 10.0), (0.1, 30.0))
# The weight that goes with the threshold: for maps and slopes, and in the mean of both.
_WITH_THRESHOLD = 3.0
# All proposals there are: these, two with the threshold, and even slots.
MOST = len(_ANSWER_WEIGHTS) + len(_MEANS) + 3


def settle(
    plan: Plan, layers: list[HeldOut], whole: Whole, most: int, advance: Callable[[int], Any]
) -> tuple[list[Choice], dict[str, Any]]:
    """The decision whose whole model loses least, recall and text weighed; and a report.

    One that loses more text than a plain window of the same slots is taken only if all do.

    Args:
        most: proposals that are run, the likeliest first.
        advance: called with 1 after each pass; there are at most `most` + 1, a window's among them.
    """
    window = whole.divergence(dict.fromkeys(plan.sparse_layers, window_attention(plan)))
    advance(1)
    decisions, tried = [], []
    for name, answer_weight, shares in _proposals(plan, layers):
        choices = decide(plan, layers, shares, answer_weight)
        if len(tried) == most or choices in decisions:  # several weights may lead to one decision
            continue
        attend = {
            number: chosen_attention(plan, layer.maps, choice)
            for number, layer, choice in zip(plan.sparse_layers, layers, choices, strict=True)
        }
        text, answers = whole.divergence(attend)
        advance(1)
        decisions.append(choices)
        tried.append(
            {
                "shares": name,
                "answer_weight": answer_weight,
                "text_loss": float(text),
                "answer_loss": float(answers),
            }
        )
    recall = plan.calibration.method.recall
    best = _best(tried, window, recall)
    choices = decisions[best]
    report = {
        **tried[best],
        "recall": recall,
        "window_text_loss": float(window[0]),
        "window_answer_loss": float(window[1]),
        "recall_alone": tried[_best(tried, window, 1.0)],
        "text_alone": tried[_best(tried, window, 0.0)],
        "tried": tried,
        "layers": [
            {
                "map": list(choice.maps),
                "slope": [round(slope / layer.unit, 6) for slope in choice.slopes],
                "topk": list(choice.topk),
                "worth": [float(worth) for worth in layer.worth],
            }
            for layer, choice in zip(layers, choices, strict=True)
        ],
    }
    return choices, report


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
        last.insert(0, ("threshold", _WITH_THRESHOLD, found))
    return [*errors[:1], *means[:1], *errors[1:3], *means[2:], *errors[3:], *means[1:2], *last]


def _best(tried: list[dict[str, Any]], window: np.ndarray, recall: float) -> int:
    """Which to take; `window` is what a plain window loses in text and at answers."""
    numbers = [n for n, row in enumerate(tried) if row["text_loss"] <= window[0]]
    numbers = numbers or list(range(len(tried)))

    def lost(n: int) -> float:
        text, answers = (tried[n][kind] for kind in ("text_loss", "answer_loss"))
        share = text / max(window[0], 1e-9), answers / max(window[1], 1e-9)
        return (1 - recall) * share[0] + recall * share[1]

    return min(numbers, key=lost)
