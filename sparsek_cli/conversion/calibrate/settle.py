"""The last word: decisions are compared by what the whole sparse model loses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sparsek_cli.conversion.calibrate.decide import Choice, HeldOut, decide
from sparsek_cli.conversion.calibrate.whole import Whole, chosen_attention, window_attention
from sparsek_cli.conversion.plan import Plan

# Losses of single layers do not quite add up to the whole model's, so that counting answers less
# or more when slots are shared out may do better.
_FACTORS = (0.1, 0.5, 1.0, 2.0)
# What answers may lose beside the decision that is best for them: a share, and nats. Facts that
# are dropped are gone, so text is compared only among decisions that keep them about as well.
_MARGIN = (1.2, 0.05)
# Passes that `settle` makes at most: these, uniform slots, and a window.
PASSES = len(_FACTORS) + 2


def settle(
    plan: Plan, layers: list[HeldOut], whole: Whole, advance: Callable[[int], Any]
) -> tuple[list[Choice], dict[str, Any]]:
    """The decision with the smallest loss in text of those that keep answers; and a report.

    One that loses more text than a plain window of the same slots is taken only if all do.
    """
    weight = plan.recipe.method.answer_weight
    per_head = plan.recipe.budgets == "per_head"
    wanted = [(factor * weight, True) for factor in _FACTORS] if per_head else []
    wanted.append((weight, False))
    window = whole.divergence(dict.fromkeys(range(len(layers)), window_attention(plan)))
    advance(1)
    decisions, tried = [], []
    for answer_weight, heads_differ in wanted:
        choices = decide(plan, layers, answer_weight, per_head=heads_differ)
        attend = {
            number: chosen_attention(plan, layer.maps, choice)
            for number, (layer, choice) in enumerate(zip(layers, choices, strict=True))
        }
        text, answers = whole.divergence(attend)
        advance(1)
        decisions.append(choices)
        tried.append(
            {
                "budgets": "per_head" if heads_differ else "uniform",
                "answer_weight": answer_weight,
                "text_loss": float(text),
                "answer_loss": float(answers),
            }
        )
    best = _best(tried, float(window[0]))
    choices = decisions[best]
    report = {
        **tried[best],
        "window_text_loss": float(window[0]),
        "window_answer_loss": float(window[1]),
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


def _best(tried: list[dict[str, Any]], window: float) -> int:
    """Which to take; `window` is what a plain window loses in text."""
    numbers = [n for n, row in enumerate(tried) if row["text_loss"] <= window]
    numbers = numbers or list(range(len(tried)))
    share, nats = _MARGIN
    most = share * min(tried[n]["answer_loss"] for n in numbers) + nats
    kept = [n for n in numbers if tried[n]["answer_loss"] <= most]
    return min(kept, key=lambda n: tried[n]["text_loss"])
