"""Tasks that are not measured: why, and what to do about it."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Absent:
    """A task, or a task at one length, that is left out: why, and what to do.

    Attributes:
        switch: the variable that keeps the hub from being asked: to unset it may do, too.
    """

    name: str
    reason: str
    remedy: str
    switch: str | None = None

    def as_dict(self) -> dict[str, str]:
        return {
            "task": self.name,
            "reason": self.reason,
            "remedy": _or_unset(self.switch, self.remedy),
        }


def explained(absent: Iterable[Absent]) -> list[tuple[list[str], str]]:
    """What is absent and why, a line per reason, with what to do: every remedy stands once."""
    by_remedy: dict[str, dict[str, list[str]]] = {}
    switches: dict[str, str] = {}  # and the remedy that it stands before
    for item in absent:
        by_remedy.setdefault(item.remedy, {}).setdefault(item.reason, []).append(item.name)
        if item.switch:
            switches.setdefault(item.switch, item.remedy)
    before = {remedy: switch for switch, remedy in switches.items()}
    return [
        (
            [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()],
            _or_unset(before.get(remedy), remedy),
        )
        for remedy, reasons in by_remedy.items()
    ]


def _or_unset(switch: str | None, remedy: str) -> str:
    return f"unset {switch}, or else: {remedy}" if switch else remedy
