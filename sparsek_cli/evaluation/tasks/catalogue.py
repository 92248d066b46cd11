"""What can be evaluated, read from definitions/*.yaml alone: no lm-eval, no torch, instant.

The YAML files are lm-eval's own format. Their `metadata.sparsek` block says what a reader needs to
know before running (what is measured, at which lengths, which data, from where), so that listing
tasks never imports the harness, which takes seconds.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

from sparsek_cli.errors import UsageError
from sparsek_cli.evaluation.tasks import lm_eval_names

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
        settings: of lm-eval's task, where a group of its own changes them.
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
    settings: dict[str, Any] = field(default_factory=dict, hash=False)
    extra: dict[str, Any] = field(default_factory=dict, hash=False, compare=False)

    @property
    def is_group(self) -> bool:
        return bool(self.members)

    @property
    def reads_text(self) -> bool:
        """Whether it takes `--text`, as its source then says."""
        return "--text" in self.source


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
        for entry in _expand(name):
            known = tasks.setdefault(entry.name, entry)
            if known.settings != entry.settings:
                raise UsageError(
                    f"'{name}' measures '{entry.name}' with {_told(entry.settings)}, and what is "
                    f"named before it with {_told(known.settings)}",
                    hint="measure them one after the other",
                )
    return list(tasks.values())


def check_limits(limits: Iterable[str], entries: Iterable[Entry]) -> None:
    """Limits of single tasks are of some that are measured, or that a recipe may measure.

    Raises:
        UsageError: a name that would count for nothing: of a group, or of no task.
    """
    known = {entry.name for entry in entries}
    known |= {name for e in catalogue().values() for name in (e.members or (e.name,))}
    for name in limits:
        group = catalogue().get(name)
        if group is not None and group.is_group:
            raise UsageError(
                f"limits: '{name}' is a group, and limits are of single tasks",
                hint=f"name its tasks: {', '.join(entry.name for entry in expand([name]))}",
            )
        if name not in known:
            near = get_close_matches(name, known, n=1)
            raise UsageError(
                f"limits: '{name}' is not measured",
                hint=f"did you mean '{near[0]}'?" if near else "name one of the tasks",
            )


def check_counted(lengths: Sequence[int], text: Sequence[str], entries: Sequence[Entry]) -> None:
    """Lengths and text that are asked for count for one task at least.

    Raises:
        UsageError: none of the tasks is made at a length, or from text.
    """
    names = entries[0].name + (f" and {len(entries) - 1} more" if len(entries) > 1 else "")
    if lengths and not any(entry.lengths for entry in entries):
        raise UsageError(
            f"lengths: {', '.join(map(str, lengths))} would count for nothing, as prompts of "
            f"{names} are as long as the data",
            hint="leave --lengths out (lengths=[] drops a recipe's); `sparsek evaluate --list` "
            "shows what has lengths",
        )
    if text and not any(entry.reads_text for entry in entries):
        raise UsageError(
            f"text: {', '.join(text)} would count for nothing, as {names} has other data",
            hint="leave --text out (text=[] drops a recipe's); `sparsek evaluate --list` shows "
            "what takes --text",
        )


def _told(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in settings.items()) or "its own settings"


def _expand(name: str, group: Entry | None = None) -> Iterator[Entry]:
    entry = catalogue().get(name)
    if entry is None:
        yield from _lm_eval_tasks(name) if group is None else [_of_group(name, group)]
    elif not entry.is_group:
        yield entry
    else:
        for member in entry.members:
            yield from _expand(member, entry)


def _of_group(name: str, group: Entry) -> Entry:
    """lm-eval's task, measured as a group of ours says; it is asked when the task is loaded."""
    return Entry(
        name,
        metric="",
        summary=group.summary,
        data=group.data,
        source=group.source,
        chat=group.chat,
        lengths=group.lengths if group.extra.get("length_names") else (),
        builtin=True,
        folders=group.folders,
        extra=group.extra,
    )


def _lm_eval_tasks(name: str) -> Iterator[Entry]:
    near = get_close_matches(name, catalogue(), n=1, cutoff=0.75)
    if near and lm_eval_names.in_its_folder(name) is None:  # a typo should not cost its whole index
        raise _unknown(name, near)
    try:
        found = lm_eval_names.tasks_of(name)
    except KeyError:
        known = [*catalogue(), *lm_eval_names.whole_index()]
        raise _unknown(name, get_close_matches(name, known, n=1, cutoff=0.4)) from None
    for task in found:
        folder = task.folder
        # What a group of ours lists is the same task by itself, and its like is measured alike.
        kin = [e for e in catalogue().values() if folder and e.folders == (folder.name,)]
        plain = Entry("", summary="a task of lm-eval", data="hub", builtin=True)
        entry = _of_group(task.name, kin[0]) if kin else replace(plain, name=task.name)
        folders = (str(folder),) if folder else ()
        yield replace(entry, folders=folders, settings=task.settings)


def _unknown(name: str, near: list[str]) -> UsageError:
    hint = f"did you mean '{near[0]}'? " if near else ""
    return UsageError(f"unknown task '{name}'", hint=hint + "`sparsek evaluate --list` shows them")
