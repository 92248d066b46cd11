"""`sparsek evaluate --compare A B`: two result folders side by side."""

from pathlib import Path
from typing import Any

from sparsek_cli.errors import UsageError
from sparsek_cli.evaluation.report.numbers_as_text import layout, number
from sparsek_cli.evaluation.report.paired_stderr import paired_error
from sparsek_cli.evaluation.report.rows import shown
from sparsek_cli.evaluation.result_files import load_results, load_samples

# Where a run reads and writes says nothing about its scores; the model has a section of its own.
_WHERE = ("model", "out", "overwrite")
# Differences in these make scores incomparable; others are worth a line.
DECISIVE = (
    "limit", "limits", "data", "text", "lengths", "seed", "truncate", "yarn", "max_new_tokens",
)  # fmt: skip
# What was found out for a task: `auto` is one thing for a model and another for the next.
OF_A_TASK = ("chat_template", "num_fewshot")


def compare(first: str, second: str) -> dict[str, Any]:
    """Every score that both folders have, and what differs between the runs.

    Raises:
        UsageError: a folder without results, or no score in common.
    """
    reports = load_results(first), load_results(second)
    ours, theirs = (_scores(report) for report in reports)
    rows = []
    for key in ours:
        if key in theirs:
            a, b = ours[key], theirs[key]
            task, length, metric, policy = key
            unit = task if length is None else f"{task}@{length}"
            samples = [load_samples(Path(f), policy, unit) for f in (first, second)]
            error = paired_error(*samples, metric)
            rows.append(
                {
                    "task": task,
                    "length": length,
                    "metric": metric,
                    "policy": policy,
                    "a": a["value"],
                    "b": b["value"],
                    "difference": b["value"] - a["value"],
                    "stderr": _joint(a["stderr"], b["stderr"]) if error is None else error,
                    "paired": error is not None,
                    "higher_is_better": a["higher_is_better"],
                }
            )
    if not rows:
        raise UsageError(
            f"'{first}' and '{second}' have no score in common",
            hint="evaluate the same tasks and lengths in both",
        )
    return {
        "a": {"folder": first, "model": reports[0]["model"]["name"]},
        "b": {"folder": second, "model": reports[1]["model"]["name"]},
        "scores": rows,
        "differences": [*_differences(*reports), *_of_tasks(*reports)],
        "only_a": len(ours.keys() - theirs.keys()),
        "only_b": len(theirs.keys() - ours.keys()),
    }


def _scores(report: dict[str, Any]) -> dict[tuple, dict[str, Any]]:
    return {
        (unit["task"], unit["length"], metric, unit["policy"]): unit["metrics"][metric]
        for unit in report["units"]
        for metric in shown(unit)
    }


def _joint(a: float | None, b: float | None) -> float | None:
    """Standard error of a difference, as if the two were measured on different samples."""
    return None if a is None or b is None else (a * a + b * b) ** 0.5


def _differences(a: dict[str, Any], b: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    pairs = {
        "model": (a["model"], b["model"], ("name", "path", "type", "sparsek")),
        "recipe": (a["recipe"], b["recipe"], tuple(a["recipe"].keys() | b["recipe"].keys())),
        "versions": (a["environment"]["versions"], b["environment"]["versions"], None),
        "environment": (a["environment"], b["environment"], ("git", "dtype", "device")),
    }
    for section, (left, right, keys) in pairs.items():
        for key in sorted(keys or left.keys() | right.keys()):
            if key in _WHERE:
                continue
            if left.get(key) != right.get(key):
                found.append(
                    {
                        "key": f"{section}.{key}",
                        "a": left.get(key),
                        "b": right.get(key),
                        "decisive": section == "recipe" and key in DECISIVE,
                    }
                )
    return found


def _of_tasks(a: dict[str, Any], b: dict[str, Any]) -> list[dict[str, Any]]:
    """How prompts of the same task were made in one run and not in the other."""
    ours, theirs = ({(u["task"], u["length"]): u for u in report["units"]} for report in (a, b))
    found = {}
    for key in OF_A_TASK:
        for unit in ours.keys() & theirs.keys():
            left, right = ours[unit], theirs[unit]
            # Folders of earlier versions do not say all of it.
            if key in left and key in right and left[key] != right[key]:
                name = f"{unit[0]}.{key}"
                found[name] = {"key": name, "a": left[key], "b": right[key], "decisive": True}
    return [found[name] for name in sorted(found)]


def as_text(comparison: dict[str, Any]) -> str:
    """The comparison for a terminal."""
    a, b = comparison["a"], comparison["b"]
    grid = [["task", "tokens", "metric", "policy", f"A: {a['model']}", f"B: {b['model']}", "B - A"]]
    for row in comparison["scores"]:
        sign = "" if row["higher_is_better"] else " (lower)"
        difference = f"{row['difference']:+.3g}"
        if row["stderr"] is not None:
            difference += f" ±{number(row['stderr'])}"
        grid.append(
            [
                row["task"],
                str(row["length"] or "data"),
                row["metric"] + sign,
                row["policy"],
                number(row["a"]),
                number(row["b"]),
                difference,
            ]
        )
    lines = layout(grid, words=(0, 2, 3))
    paired = {row["paired"] for row in comparison["scores"] if row["stderr"] is not None}
    same, apart = "the same prompts answered twice", "two measurements on their own"
    if paired:
        how = f"{same}, or {apart}" if len(paired) > 1 else same if True in paired else apart
        lines += ["", f"± standard error of the difference ({how})."]
    decisive = [d for d in comparison["differences"] if d["decisive"]]
    if decisive:
        # Behind the last dot: names of tasks have some themselves.
        keys = ", ".join(dict.fromkeys(d["key"].rpartition(".")[2] for d in decisive))
        lines += ["", f"warning: not the same measurement, these settings differ: {keys}"]
    others = [d["key"] for d in comparison["differences"] if not d["decisive"]]
    if others:
        lines += ["", f"also different: {', '.join(others)}"]
    for name in "ab":
        if comparison[f"only_{name}"]:
            count = comparison[f"only_{name}"]
            lines.append(f"only in {name.upper()}: {count} score{'s' if count > 1 else ''}")
    return "\n".join(lines)
