"""Tasks and rows that are not measured: why, and what to do about it."""

from collections.abc import Iterable
from dataclasses import dataclass

from sparsek_cli.errors import SparsekError


@dataclass(frozen=True)
class Absent:
    """A task, a task at one length, or a row of the table that is left out: why, and what to do.

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


def nothing_left(absent: Iterable[Absent]) -> SparsekError:
    """The error of an evaluation that all tasks are absent from."""
    absent = list(absent)
    groups = explained(absent)
    missing = "; ".join(line for lines, _ in groups for line in lines)
    hint = "; ".join(remedy for _, remedy in groups)
    if len(groups) > 1 and len({item.reason for item in absent}) == 1:
        missing = f"{', '.join(item.name for item in absent)}: {absent[0].reason}"
        elsewhere = "name --data DIR; `sparsek evaluate --list` says what each task reads there"
        hint = _or_unset(absent[0].switch, elsewhere)
    return SparsekError(f"no data for {missing}", hint=hint)


def _or_unset(switch: str | None, remedy: str) -> str:
    return f"unset {switch}, or else: {remedy}" if switch else remedy
