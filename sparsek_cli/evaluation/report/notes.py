"""What a reader must know to judge a table, in sentences below it."""

from collections.abc import Sequence
from typing import Any

from sparsek_cli.evaluation.policies.registry import DENSE, SHARED
from sparsek_cli.evaluation.report.retrieval import note_on_unanswered
from sparsek_cli.evaluation.report.rows import rows
from sparsek_cli.evaluation.tasks.skipped import Absent, explained

AFTER = ("snapkv", "h2o", "kvpress")  # policies that evict when a prompt ends
ORACLE = "kvzip"


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
    if positions := report["model"].get("positions"):
        notes.append(
            f"positions: {positions}; dense, and what evicts after a dense prompt, has those of "
            "transformers for the longest prompt of a task."
        )
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
