"""Tasks that are not measured: why, and what to do about it."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Absent:
    """A task, or a task at one length, that is left out: why, and what to do."""

    name: str
    reason: str
    remedy: str

    def as_dict(self) -> dict[str, str]:
        return {"task": self.name, "reason": self.reason, "remedy": self.remedy}


def explained(absent: Iterable[Absent]) -> list[tuple[list[str], str]]:
    """What is absent and why, a line per reason, with what to do: every remedy stands once."""
    by_remedy: dict[str, dict[str, list[str]]] = {}
    for item in absent:
        by_remedy.setdefault(item.remedy, {}).setdefault(item.reason, []).append(item.name)
    return [
        ([f"{', '.join(names)}: {reason}" for reason, names in reasons.items()], remedy)
        for remedy, reasons in by_remedy.items()
    ]
