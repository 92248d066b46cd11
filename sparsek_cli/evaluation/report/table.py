"""Results as a table: plain text for a terminal, Markdown for a model card."""

from collections.abc import Sequence
from typing import Any

from sparsek_cli.byte_units import size
from sparsek_cli.evaluation.policies.registry import DENSE
from sparsek_cli.evaluation.report.notes import notes
from sparsek_cli.evaluation.report.numbers_as_text import beside_dense, layout, number, ratio
from sparsek_cli.evaluation.report.rows import rows

MAX_COLUMNS = 5  # policies side by side


def text(report: dict[str, Any]) -> str:
    """The table for a terminal, with what a reader needs to judge it below."""
    grid = _grid(report)
    words = (0, 3, 4) if grid[0][4] == "policy" else (0, 3)
    return "\n".join([title(report), "", *layout(grid, words), "", *notes(report)])


def markdown(report: dict[str, Any]) -> str:
    """The table as Markdown, ready for a model card."""
    grid = _grid(report)
    lines = ["| " + " | ".join(row) + " |" for row in grid]
    lines.insert(1, "|" + "|".join(["---"] * len(grid[0])) + "|")
    below = [f"- {note}" for note in notes(report)]
    return "\n".join([f"## {title(report)}", "", *lines, "", *below]) + "\n"


def title(report: dict[str, Any]) -> str:
    model, environment = report["model"], report["environment"]
    block = model["sparsek"]
    budget = ""
    swept = report["recipe"].get("budgets")
    if block is not None and swept:
        budget = f", keeps {', '.join(map(str, swept))} pairs per KV head"
    elif block is not None:
        topk = block["topk"] if isinstance(block["topk"], int) else _mean_topk(block["topk"])
        budget = f", keeps {block['sinks']} sinks + {topk} selected + {block['window']} window"
    dtype = environment["dtype"].removeprefix("torch.")
    return f"{model['name']} ({model['type']}{budget}; {dtype} on {environment['device']})"


def _mean_topk(topk: Sequence[Any]) -> str:
    """Of `topk` by layer (None: a layer of another kind, which keeps no pairs of ours) and head."""
    rows = [row if isinstance(row, list) else [row] for row in topk if row is not None]
    flat = [k for row in rows for k in row]
    return f"{sum(flat) / len(flat):.4g} (mean over heads)"


def _grid(report: dict[str, Any]) -> list[list[str]]:
    """Cells of the table; a column per policy, or with many of them a line per policy."""
    policies = report["policies"]
    grid = [["task", "tokens", "n", "metric", *policies]]
    for row in rows(report):
        samples = next(iter(row["cells"].values()))["samples"]
        arrow = "" if row["higher_is_better"] else " (lower)"
        grid.append(
            [
                row["task"],
                str(row["length"] or "data"),
                str(samples),
                row["metric"] + arrow,
                *(_cell(row["cells"].get(name)) for name in policies),
            ]
        )
    grid += byte_rows(report)
    if len(policies) <= MAX_COLUMNS:
        return grid
    tall = [["task", "tokens", "n", "metric", "policy", "score"]]
    for first, *line in grid[1:]:
        for name, cell in zip(policies, line[3:], strict=True):
            tall.append([first, *line[:3], name, cell])
    return tall


def _cell(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "-"
    text = number(cell["value"])
    if cell["stderr"] is not None:
        text += f" ±{number(cell['stderr'])}"
    return text if cell["delta"] is None else f"{text} ({beside_dense(cell)})"


def byte_rows(report: dict[str, Any]) -> list[list[str]]:
    """One row per length: bytes of keys and values that each policy holds after as many tokens."""
    lengths: dict[int | None, dict[str, dict[str, Any]]] = {}
    for unit in report["units"]:
        longest = lengths.setdefault(unit["length"], {})
        before = longest.get(unit["policy"])
        if before is None or unit["proof"]["kv_tokens"] > before["kv_tokens"]:
            longest[unit["policy"]] = unit["proof"]
    rows = []
    for length, by_policy in sorted(lengths.items(), key=lambda item: item[0] or float("inf")):
        dense = by_policy.get(DENSE)
        cells = []
        for name in report["policies"]:
            proof = by_policy.get(name)
            shown = "-" if proof is None else size(proof["kv_bytes"])
            if dense and proof and name != DENSE:
                shown += f" ({ratio(proof['kv_bytes'] / dense['kv_bytes'])})"
            cells.append(shown)
        # Answers differ in length, and so does what was read; dense bytes are those of its own.
        tokens = (dense or max(by_policy.values(), key=lambda p: p["kv_tokens"]))["kv_tokens"]
        rows.append(["KV cache", str(length or tokens), "", "bytes (lower)", *cells])
    return rows
