"""What `sparsek evaluate --list` prints."""

from typing import Any

from sparsek_cli.evaluation.tasks.catalogue import Entry, catalogue


def listing_data() -> list[dict[str, Any]]:
    """Every group and task with what a reader needs to choose."""
    return [
        {
            "name": entry.name,
            "members": list(entry.members),
            "summary": entry.summary,
            "metric": entry.metric,
            "lengths": list(entry.lengths),
            "data": entry.data,
            "source": entry.source,
        }
        for entry in catalogue().values()
    ]


def listing() -> str:
    """Groups with their tasks below them, then the tasks that are in no group."""
    entries = catalogue()
    inside = {name for entry in entries.values() for name in entry.members}
    lines = [_line("task", "metric", "lengths", "what, and where its data comes from")]
    for entry in entries.values():
        if entry.name in inside:
            continue
        lines += ["", _describe(entry.name)]
        for member in entry.members:
            lines.append("  " + (_describe(member, entry) if member in entries else member))
    return "\n".join(lines)


def _describe(name: str, parent: Entry | None = None) -> str:
    """One line; a member names the source of its data only where it is not the group's."""
    entry = catalogue()[name]
    lengths = ",".join(map(str, entry.lengths)) or "data"
    known = parent is not None and parent.source == entry.source
    where = "" if known else f" [{entry.source or entry.data}]"
    return _line(name, entry.metric, lengths, entry.summary + where)


def _line(name: str, metric: str, lengths: str, rest: str) -> str:
    return f"{name:<22} {metric:<10} {lengths:<12} {rest}"
