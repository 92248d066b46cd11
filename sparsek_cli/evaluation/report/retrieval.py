"""Retrieval tasks: how much of what dense attention finds a policy finds."""

from collections.abc import Sequence
from typing import Any

from sparsek_cli.evaluation.policies.registry import DENSE

NEEDLES = ("ruler_", "niah")  # shown with the share of dense
RETRIEVAL = (*NEEDLES, "recall")
LENIENT = "contains"  # of the metrics of recall: an answer in other words is an answer
ENOUGH = 0.2  # a score of dense attention below it leaves nothing to compare


def share_of_dense(task: str, value: float, dense: float | None) -> float | None:
    """`value` over dense's score in the needle tasks; None elsewhere and without a score of it."""
    return value / dense if task.startswith(NEEDLES) and dense else None


def unanswered_by_dense(units: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Retrieval tasks that the model itself cannot do, with {task, length, metric, dense}.

    What a policy scores there says nothing about the policy.
    """
    found = []
    for unit in units:
        if unit["policy"] != DENSE or not unit["task"].startswith(RETRIEVAL):
            continue
        metric = LENIENT if LENIENT in unit["metrics"] else unit["primary"]
        score = unit["metrics"][metric]["value"]
        if score < ENOUGH:
            where = {"task": unit["task"], "length": unit["length"]}
            found.append(where | {"metric": metric, "dense": score})
    return found


def note_on_unanswered(units: Sequence[dict[str, Any]]) -> str | None:
    """The line below a table about such tasks; None when there are none."""
    found = unanswered_by_dense(units)
    if not found:
        return None
    names = ", ".join(
        item["task"] if item["length"] is None else f"{item['task']}@{item['length']}"
        for item in found
    )
    verb = "says" if len(found) == 1 else "say"
    return (
        f"{names} {verb} nothing about this model: dense attention itself scores under {ENOUGH:g}."
    )
