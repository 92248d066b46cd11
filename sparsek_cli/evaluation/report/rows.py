"""What a table shows: a row per task, length and metric, a cell per policy."""

from collections.abc import Sequence
from typing import Any

from sparsek_cli.evaluation.policies.registry import DENSE
from sparsek_cli.evaluation.report.retrieval import share_of_dense
from sparsek_cli.evaluation.tasks.catalogue import catalogue

SECONDARY = {
    "ppl": ("ppl_last_quarter",),
    "recall": ("contains", "exact_heldout"),
}  # shown beside the primary


def rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per task, length and metric, with a cell per policy that was measured.

    A cell has value, stderr, delta (to dense, None without it), share (of dense, in needle tasks
    alone), bytes and kept (share of pairs).
    """
    table: dict[tuple, dict[str, Any]] = {}
    for unit in report["units"]:
        for metric in shown(unit):
            found = unit["metrics"][metric]
            key = (unit["task"], unit["length"], metric)
            row = table.setdefault(
                key,
                {
                    "task": unit["task"],
                    "length": unit["length"],
                    "metric": metric,
                    "higher_is_better": found["higher_is_better"],
                    "cells": {},
                },
            )
            row["cells"][unit["policy"]] = {
                "value": found["value"],
                "stderr": found["stderr"],
                "delta": None,
                "share": None,
                "bytes": unit["proof"]["kv_bytes"],
                "tokens": unit["proof"]["kv_tokens"],
                "kept": unit["proof"]["kept_share"],
                "truncated": unit["proof"]["truncated_prompts"],
                "samples": found["samples"],
            }
    for row in table.values():
        _compare_to_dense(row)
    lines = list(table.values())
    return lines + _group_means(report, lines)


def _group_means(report: dict[str, Any], lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows like `lines` with the mean over the tasks of every group that was asked for.

    Only of tasks that were measured alike: same metric, same length, same policies.
    """
    found = []
    for name in report["recipe"].get("tasks") or ():
        entry = catalogue().get(name)
        alike: dict[tuple, list[dict[str, Any]]] = {}
        for line in lines if entry is not None else ():
            if line["task"] in entry.members:
                key = (line["length"], line["metric"], *line["cells"])
                alike.setdefault(key, []).append(line)
        for many in alike.values():
            if len(many) > 1:
                cells = {
                    policy: _mean_cell([line["cells"][policy] for line in many])
                    for policy in many[0]["cells"]
                }
                label = f"{name}, mean of {len(many)}"
                found.append(many[0] | {"task": label, "cells": cells})
                _compare_to_dense(found[-1])
    return found


def _compare_to_dense(row: dict[str, Any]) -> None:
    """Fills in how far each cell is from dense's."""
    dense = row["cells"].get(DENSE)
    for name, cell in row["cells"].items():
        if dense is not None and name != DENSE:
            cell["delta"] = cell["value"] - dense["value"]
            cell["share"] = share_of_dense(row["task"], cell["value"], dense["value"])


def _mean_cell(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean of several tasks' cells; its error is that of independent tasks."""
    count = len(cells)
    errors = [cell["stderr"] for cell in cells]
    known = None not in errors
    return cells[0] | {
        "value": sum(cell["value"] for cell in cells) / count,
        "stderr": sum(e * e for e in errors) ** 0.5 / count if known else None,
        "truncated": sum(cell["truncated"] for cell in cells),
        "samples": sum(cell["samples"] for cell in cells),
    }


def shown(unit: dict[str, Any]) -> list[str]:
    """The metrics of a unit that tables show: the primary one and a few beside it."""
    extra = next((v for k, v in SECONDARY.items() if unit["task"].startswith(k)), ())
    return [unit["primary"], *(m for m in extra if m in unit["metrics"])]
