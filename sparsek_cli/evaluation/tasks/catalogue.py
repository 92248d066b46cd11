"""What can be evaluated, read from definitions/*.yaml alone: no lm-eval, no torch, instant.

The YAML files are lm-eval's own format. Their `metadata.sparsek` block says what a reader needs to
know before running (what is measured, at which lengths, which data, from where), so that listing
tasks never imports the harness, which takes seconds.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

from sparsek_cli.errors import UsageError

TASK_FOLDER = Path(__file__).parent / "definitions"


@dataclass(frozen=True)
class Entry:
    """One task or group of tasks.

    Attributes:
        name: what `--tasks` takes.
        members: the tasks of a group, in order; empty for a task.
        summary, metric, data, source: for the reader; `metric` of a task is its first metric.
        lengths: prompt lengths in tokens it is run at by default; empty: as long as the data.
        chat: whether prompts go through the chat template when the tokenizer has one.
        builtin: the task is lm-eval's own.
        folders: of lm-eval's tasks, where this one or a group's builtin members are defined.
        extra: anything else in the block, for the task's own code.
    """

    name: str
    members: tuple[str, ...] = ()
    summary: str = ""
    metric: str = ""
    data: str = ""
    source: str = ""
    lengths: tuple[int, ...] = ()
    chat: bool = False
    builtin: bool = False
    folders: tuple[str, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict, hash=False, compare=False)

    @property
    def is_group(self) -> bool:
        return bool(self.members)


@lru_cache(maxsize=1)
def catalogue() -> dict[str, Entry]:
    """Every entry by name, groups first, each group's members after it."""
    entries = {}
    for file in sorted(TASK_FOLDER.glob("**/*.yaml")):
        config = _read(file)
        name = config.get("group") or config.get("task")
        if not isinstance(name, str):
            continue  # a file that others include
        block = dict((config.get("metadata") or {}).get("sparsek") or {})
        members = tuple(config["task"]) if "group" in config else ()
        known = {
            key: block.pop(key)
            for key in ("summary", "metric", "data", "source", "chat") & block.keys()
        }
        for key in ("lengths", "folders"):
            known[key] = tuple(block.pop(key, ()))
        entries[name] = Entry(name, members, extra=block, **known)
    return dict(sorted(entries.items(), key=lambda item: (not item[1].is_group, item[0])))


def _read(file: Path) -> dict[str, Any]:
    """One YAML file with its `include`d files below it; `!function` values become their names."""
    import yaml

    base = yaml.CSafeLoader if getattr(yaml, "__with_libyaml__", False) else yaml.SafeLoader

    class Loader(base):
        """The safe loader, plus lm-eval's tag read as plain text."""

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    config = yaml.load(file.read_text(encoding="utf-8"), Loader=Loader) or {}
    merged: dict[str, Any] = {}
    includes = config.pop("include", [])
    for name in [includes] if isinstance(includes, str) else includes:
        merged |= _read(file.parent / name)
    return merged | config


def expand(names: Iterable[str]) -> list[Entry]:
    """The tasks that `names` stand for, groups opened, each once, in the order asked for.

    A name of neither a task nor a group of ours may be lm-eval's own; only then is lm-eval asked.

    Raises:
        UsageError: a name that nothing has; the nearest one is shown.
    """
    tasks: dict[str, Entry] = {}
    for name in names:
        for entry in _expand(name, ()):
            tasks.setdefault(entry.name, entry)
    return list(tasks.values())


def _expand(name: str, parents: tuple[str, ...]) -> Iterator[Entry]:
    entry = catalogue().get(name)
    if entry is None:
        yield from _lm_eval_tasks(name, catalogue()[parents[-1]] if parents else None)
    elif not entry.is_group:
        yield entry
    else:
        for member in entry.members:
            yield from _expand(member, (*parents, name))


def _lm_eval_tasks(name: str, parent: Entry | None) -> Iterator[Entry]:
    if parent is not None:  # named by a file of ours: lm-eval is asked when the task is loaded
        yield Entry(
            name,
            metric="",
            summary=parent.summary,
            data=parent.data,
            source=parent.source,
            chat=parent.chat,
            lengths=parent.lengths if parent.extra.get("length_names") else (),
            builtin=True,
            folders=parent.folders,
            extra=parent.extra,
        )
        return
    near = get_close_matches(name, catalogue(), n=1, cutoff=0.75)
    if near:  # a typo in a name of ours should not cost the import of lm-eval
        raise _unknown(name, near)
    found = _in_its_folder(name) or lm_eval_index().get(name)
    if found is None:
        known = [*catalogue(), *lm_eval_index()]
        raise _unknown(name, get_close_matches(name, known, n=1, cutoff=0.4))
    members = sorted(found.tags or ()) if found.kind.name == "TAG" else []
    if found.kind.name == "GROUP":
        members = [m if isinstance(m, str) else m.get("task") or m.get("group") for m in _of(found)]
    if not members:
        folders = (str(found.yaml_path.parent),) if found.yaml_path else ()
        yield Entry(name, summary="a task of lm-eval", data="hub", builtin=True, folders=folders)
    for member in members:
        yield from _lm_eval_tasks(member, None)


def _of(found: Any) -> list:
    task = (found.cfg or {}).get("task") or []
    return task if isinstance(task, list) else [task]


def _in_its_folder(name: str) -> Any:
    """lm-eval's entry of a task or group in a folder called as its name begins; None: not there.

    Two of three are. A tag's tasks may lie in any folder.
    """
    import lm_eval.tasks

    theirs, words = Path(lm_eval.tasks.__file__).parent, name.split("_")
    for count in range(len(words), 0, -1):
        folder = "_".join(words[:count])
        if not re.fullmatch(r"[\w-]+", folder) or not (theirs / folder).is_dir():
            continue
        found = _index_of(str(theirs / folder)).get(name)
        if found is not None and found.kind.name != "TAG":
            return found
    return None


@lru_cache(maxsize=8)
def _index_of(folder: str) -> dict[str, Any]:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder, include_defaults=False).task_index


@lru_cache(maxsize=1)
def lm_eval_index() -> dict[str, Any]:
    """lm-eval's registry of built-in names (about four seconds the first time)."""
    from lm_eval.tasks import TaskManager

    return TaskManager().task_index


def _unknown(name: str, near: list[str]) -> UsageError:
    hint = f"did you mean '{near[0]}'? " if near else ""
    return UsageError(f"unknown task '{name}'", hint=hint + "`sparsek evaluate --list` shows them")
