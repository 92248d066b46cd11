"""Results as a table: plain text for a terminal, Markdown for a model card."""

from collections.abc import Sequence
from typing import Any

from sparsek_cli.evaluation.policies.registry import DENSE, SHARED
from sparsek_cli.evaluation.report.retrieval import note_on_unanswered, share_of_dense
from sparsek_cli.evaluation.tasks.catalogue import catalogue
from sparsek_cli.evaluation.tasks.skipped import Absent, explained

SECONDARY = {
    "ppl": ("ppl_last_quarter",),
    "recall": ("contains", "exact_heldout"),
}  # shown beside the primary
AFTER = ("snapkv", "h2o", "kvpress")  # policies that evict when a prompt ends
ORACLE = "kvzip"
MAX_COLUMNS = 5  # policies side by side


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
    for name in report["recipe"].get("tasks", ()):
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


def beside_dense(cell: dict[str, Any]) -> str:
    """How a score compares with dense's: the difference, and the share of it where that is said."""
    share = "" if cell["share"] is None else f", {cell['share']:.0%}"
    return f"{cell['delta']:+.3g}{share}"


def number(value: float) -> str:
    """Four significant digits, without an exponent where people expect none."""
    if value != value:
        return "nan"
    if value == 0 or 0.001 <= abs(value) < 100_000:
        digits = max(0, 3 - _magnitude(value))
        return f"{value:.{min(digits, 4)}f}"
    return f"{value:.3g}"


def _magnitude(value: float) -> int:
    return len(str(int(abs(value)))) - 1 if abs(value) >= 1 else 0


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
                shown += f" ({_ratio(proof['kv_bytes'] / dense['kv_bytes'])})"
            cells.append(shown)
        # Answers differ in length, and so does what was read; dense bytes are those of its own.
        tokens = (dense or max(by_policy.values(), key=lambda p: p["kv_tokens"]))["kv_tokens"]
        rows.append(["KV cache", str(length or tokens), "", "bytes (lower)", *cells])
    return rows


def _ratio(share: float) -> str:
    """1/8 for an eighth; 4x where slots outnumber the tokens."""
    return f"1/{1 / share:.3g}" if share <= 1 else f"{share:.3g}x"


def size(count: float) -> str:
    """Bytes with a unit: 1.5 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError


def layout(grid: Sequence[Sequence[str]], words: Sequence[int] = (0, 3)) -> list[str]:
    """Lines of aligned columns, a rule below the first; columns in `words` go to the left."""
    widths = [max(len(row[i]) for row in grid) for i in range(len(grid[0]))]
    lines = []
    for row in grid:
        cells = [
            cell.ljust(width) if column in words else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def notes(report: dict[str, Any]) -> list[str]:
    cells = [cell for row in rows(report) for cell in row["cells"].values()]
    error = "± standard error" if any(cell["stderr"] is not None for cell in cells) else ""
    delta = "in brackets the difference to dense, the same weights"
    delta = delta if any(cell["delta"] is not None for cell in cells) else ""
    if any(cell["share"] is not None for cell in cells):
        delta += " (in needle tasks also the share of its score)"
    legend = "; ".join(filter(None, [error, delta]))
    notes = [f"{legend}."] if legend else []
    if not report.get("complete", True):
        notes.insert(0, "not complete: the run was stopped; go on with --resume.")
    nothing = note_on_unanswered(report["units"])
    if nothing is not None:
        notes.append(nothing)
    if report["recipe"].get("yarn"):
        notes.append(f"rotary positions stretched {report['recipe']['yarn']:g} times (YaRN).")
    cut = sum(u["proof"]["truncated_prompts"] for u in report["units"] if u["policy"] == DENSE)
    if cut:
        notes.append(f"{cut} prompts were cut ({report['recipe']['truncate']}).")
    backends = sorted({b for unit in report["units"] for b in unit["proof"]["backends"]})
    if backends:
        notes.append(f"SparseK attention ran on: {', '.join(backends)}.")
    absent = [Absent(item["task"], item["reason"], item["remedy"]) for item in report["absent"]]
    for lines, remedy in explained(absent):
        notes.append(f"not measured: {'; '.join(lines)} ({remedy})")
    return notes + _notes_on_rivals(report["policies"])


def _notes_on_rivals(policies: Sequence[str]) -> list[str]:
    """What rivals know when they choose, and how they spread their slots."""
    notes, rules = [], {name: name.split("-")[0].split(":")[0] for name in policies}
    rivals = [name for name, rule in rules.items() if rule in AFTER]
    if rivals:
        notes.append(
            f"{', '.join(rivals)} read each prompt densely, question included, before they evict, "
            "in a conversation at its first question; the others never see the question when they "
            "choose."
        )
    oracles = [name for name, rule in rules.items() if rule == ORACLE]
    if oracles:
        notes.append(
            f"{', '.join(oracles)}: the oracle of eviction without the question: the context is "
            "read densely and told again to the model, and what that looks at stays."
        )
    shared = [name for name in policies if SHARED in name]
    if shared:
        notes.append(
            f"{', '.join(shared)}: the same slots in all, shared out over layers and heads by one "
            "threshold."
        )
    return notes
