"""lm-eval's tasks, groups and tags by name, found without reading all of its 14,000 files as YAML.

That takes seven seconds. Two of three names are in a folder called as they begin; for the others
only the files are read that say the name, or that include one which does.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sparsek_cli.errors import UsageError

# Of a group's file; its other keys are settings of its tasks, as the other keys of a member are.
_OF_A_GROUP = {"group", "group_alias", "task", "aggregate_metric_list", "metadata", "tag"}
_NOT_MEASURED = {"task", "task_alias", "group", "group_alias"}
SETTINGS = ("num_fewshot", "fewshot_split")  # that a task can be measured with


@dataclass(frozen=True)
class Named:
    """A task of lm-eval.

    Attributes:
        folder: where its file lies; None: lm-eval has it without one.
        settings: what the group that it was found in changes of it, some of `SETTINGS`.
    """

    name: str
    folder: Path | None
    settings: dict[str, Any] = field(default_factory=dict)


def tasks_of(name: str) -> list[Named]:
    """The tasks that a name stands for, in lm-eval's order.

    Raises:
        KeyError: lm-eval has no such name.
        UsageError: a group that defines tasks within itself, or changes more than `SETTINGS`.
    """
    return list(_tasks(name, "", {}))


def _tasks(name: str, group: str, changed: dict[str, Any]) -> Iterator[Named]:
    found = find(name)
    if found is None and not group:
        raise KeyError(name)
    if found is None:
        raise UsageError(
            f"lm-eval's group '{group}' defines '{name}' within itself, not as a task",
            hint="name tasks that have files of their own",
        )
    if found.kind.name == "TAG":
        for task in sorted(found.tags):
            yield from _tasks(task, name, changed)
    elif found.kind.name == "GROUP":
        yield from _members(name, found.cfg, changed)
    else:
        own = found.cfg or {}
        settings = {
            key: value
            for key, value in changed.items()
            if key not in _NOT_MEASURED and own.get(key) != value
        }
        beyond = sorted(settings.keys() - set(SETTINGS))
        if beyond:
            raise UsageError(
                f"lm-eval's group '{group}' measures '{name}' with another {', '.join(beyond)}",
                hint=f"name '{name}' itself, to be measured as its own file says",
            )
        yield Named(name, found.yaml_path and found.yaml_path.parent, settings)


def _members(group: str, config: dict[str, Any], changed: dict[str, Any]) -> Iterator[Named]:
    """Of a group of its own file, or of one within another's; `changed` by groups around it."""
    changed = {key: value for key, value in config.items() if key not in _OF_A_GROUP} | changed
    listed = config.get("task") or []
    for member in [listed] if isinstance(listed, str) else listed:
        if isinstance(member, str):
            yield from _tasks(member, group, changed)
        elif "group" in member and "task" in member:
            yield from _members(member["group"], member, changed)
        else:
            named = str(member.get("group") or member.get("task") or "a task without a name")
            yield from _tasks(named, group, changed | member)


def find(name: str) -> Any:
    """lm-eval's entry of a task, group or tag; None: it has none."""
    found = in_its_folder(name)
    if found is not None and found.kind.name != "TAG":  # a tag's tasks may lie in any folder
        return found
    return _where_it_is_said(name)


def in_its_folder(name: str) -> Any:
    """lm-eval's entry of a name in a folder called as it begins; None: not there."""
    words = name.split("_")
    for count in range(len(words), 0, -1):
        folder = "_".join(words[:count])
        if not re.fullmatch(r"[\w-]+", folder) or not (tasks_folder() / folder).is_dir():
            continue
        found = _index_of(tasks_folder() / folder).get(name)
        if found is not None:
            return found
    return None


@lru_cache(maxsize=1)
def tasks_folder() -> Path:
    """Where lm-eval's tasks are; found without importing it, which takes a second."""
    spec = find_spec("lm_eval")
    places = (spec.submodule_search_locations if spec else None) or ()
    return next((Path(place) / "tasks" for place in places), Path("lm_eval", "tasks"))


@lru_cache(maxsize=64)
def _where_it_is_said(name: str) -> Any:
    """Its entry in an index of the files that say it, or include one that does."""
    says = re.compile(rf"(?<!\w){re.escape(name)}(?!\w)".encode())
    known: dict[str, bool] = {}

    def said(file: str) -> bool:
        if file not in known:
            known[file] = False  # for files that include each other
            text, included = _text(file)
            known[file] = says.search(text) is not None or any(map(said, included))
        return known[file]

    files = [file for file in _files() if said(str(file))]
    return _index_of(_Files(tuple(files))).get(name)


@lru_cache(maxsize=1)
def _files() -> list[Path]:
    return [*tasks_folder().glob("**/*.yaml")]


@lru_cache(maxsize=1 << 16)
def _text(file: str) -> tuple[bytes, list[str]]:
    """What a file says, and the files that it includes."""
    try:
        text = Path(file).read_bytes()
    except OSError:  # lm-eval leaves out what includes it
        return b"", []
    folder = os.path.dirname(file)
    names = re.findall(rb"^include:[ \t]*[\"']?([^\s\"'#]+)", text, re.MULTILINE)
    return text, [os.path.normpath(os.path.join(folder, os.fsdecode(name))) for name in names]


@dataclass(frozen=True)
class _Files:
    """What lm-eval asks of a folder."""

    files: tuple[Path, ...]

    def glob(self, pattern: str) -> tuple[Path, ...]:
        return self.files


@lru_cache(maxsize=8)
def _index_of(folder: Path | _Files) -> dict[str, Any]:
    from lm_eval.tasks._index import TaskIndex

    return TaskIndex.build([folder])


@lru_cache(maxsize=1)
def whole_index() -> dict[str, Any]:
    """All of lm-eval's names (seven seconds the first time)."""
    return _index_of(tasks_folder())
