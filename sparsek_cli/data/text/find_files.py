"""Which files a user means by files, folders and globs, and what is a hub dataset instead."""

import glob
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from sparsek_cli import hub
from sparsek_cli.data.text.made_folders import say_made, without_made
from sparsek_cli.disk import check_name
from sparsek_cli.errors import UsageError

_LOG = logging.getLogger("sparsek_cli")
PLAIN = (".txt", ".md", ".py")
SUFFIXES = (".jsonl", *PLAIN, ".parquet")
READABLE = tuple(s + z for s in SUFFIXES for z in ("", ".zst"))

# What names of files with text end in that are not read. A dataset may be called wmt/news.en, with
# a folder wmt here.
_UNREAD = (".json", ".csv", ".tsv", ".arrow", ".pdf", ".html", ".xml", ".docx", ".rst", ".tex",
           ".log", ".text", ".yaml", ".gz", ".zip", ".xz", ".bz2", ".tar")  # fmt: skip


def is_readable(name: str) -> bool:
    """Whether a file of that name is read; Windows writes NOTES.TXT."""
    return name.lower().endswith(READABLE)


def is_hub_id(spec: object) -> bool:
    """Whether `spec` can only mean a dataset on the hub."""
    return (
        isinstance(spec, str)
        and hub.is_hub_id(spec)
        and not is_readable(spec)
        and not Path(spec).exists()
        and not (spec.lower().endswith(_UNREAD) and Path(spec).parent.is_dir())
    )


def find_files(spec: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files that `spec` means, each once, sorted within each folder or glob.

    Raises:
        UsageError: a path is missing, a folder or glob holds nothing readable, or a file has a
            type that is not read.
    """
    items: Iterable = [spec] if isinstance(spec, str | Path) else spec
    found: dict[Path, None] = {}
    for item in items:
        check_name(str(item))
        path = Path(item).expanduser()
        if path.is_file():
            if not is_readable(path.name):
                raise UsageError(f"cannot read '{path}': unknown file type", hint=_kinds())
            matches = [path]
        elif path.is_dir():
            held = sorted(p for p in path.rglob("*") if p.is_file() and not _is_hidden(p, path))
            held, made = without_made(held, path)
            if made:
                _warn_once(say_made(path, made))
            matches = [p for p in held if is_readable(p.name)]
            if not matches:
                raise UsageError(f"folder '{path}' holds no text files", hint=_kinds())
            _say_what_is_left_out(path, held)
        elif glob.has_magic(str(path)):
            named = (Path(p) for p in sorted(glob.glob(str(path), recursive=True)))
            matches = [p for p in named if p.is_file() and _is_wanted(p.name)]
            if not matches:
                raise UsageError(f"no text file matches '{path}'", hint=_kinds())
        elif path.exists():  # a pipe, or a link to one: <(...) of a shell, /dev/stdin
            raise UsageError(
                f"'{path}' is no plain file: it cannot be read twice",
                hint="write its text into a file first, and name that",
            )
        else:
            hint = "name a file, folder, glob, or a hub dataset as owner/name"
            if said := hub.instead(str(item), "datasets"):
                hint += f"; {said}"
            elif "://" in str(item):
                hint = "fetch it into a file first: nothing is read from other places than the hub"
            raise UsageError(f"no such file or folder: '{item}'", hint=hint)
        found.update(dict.fromkeys(matches))
    if not found:
        raise UsageError("no text was named", hint=_kinds())
    return list(found)


def _is_hidden(path: Path, folder: Path) -> bool:
    """By its name or that of a folder on the way: .git, .venv and .ipynb_checkpoints hold copies
    and programs, which nobody means who names a folder of documents."""
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _is_wanted(name: str) -> bool:
    return is_readable(name) and not name.startswith(".")


def _say_what_is_left_out(folder: Path, held: list[Path]) -> None:
    """A folder may hold a licence or a picture; that its .csv is not read must be known."""
    others = Counter(path.suffix or path.name for path in held if not is_readable(path.name))
    if others:
        kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common(4))
        more = ", ..." if len(others) > 4 else ""
        _warn_once(f"'{folder}': files of types that are not read: {kinds}{more}")


@cache
def _warn_once(message: str) -> None:
    _LOG.warning("%s", message)


def _kinds() -> str:
    return f"readable: {' '.join(SUFFIXES)}, each also with .zst"
