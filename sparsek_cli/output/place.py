"""The one decision about what a verb may write on: OUT, or a single file."""

import os
import re
import shlex
import stat
from pathlib import Path

from sparsek_cli.disk import check_name
from sparsek_cli.errors import UsageError
from sparsek_cli.output.contents import (
    ADAPTERS,
    MODEL,
    RESULTS,
    RUN,
    SCORERS_ALONE,
    Contents,
)
from sparsek_cli.plain_files import kind_of

BESIDE = len("..old.xxxxxxxx.part")  # what `leftovers` adds to the name of OUT
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_ANOTHER = "name a folder that does not exist yet"


def check_folder(
    out: Path, contents: Contents, *, overwrite: bool, model: Path | None = None
) -> None:
    """OUT must be absent, an empty folder or, with `overwrite`, a folder that this tool wrote.

    Args:
        out: the folder to write.
        contents: what this tool writes there.
        overwrite: whether the user gave the folder up.
        model: the folder of the model that is read, which must survive.

    Raises:
        UsageError: anything else; the message names what stands in the way.
    """
    out = absolute(out)
    kind = _kind_of(out)
    if contents not in (RESULTS, RUN):  # beside those nothing is staged
        _check_length(out)
    if kind in (None, "folder"):
        check_not_inside(out, model)
    if kind is None:
        _check_parents(out)
        return
    if kind != "folder":
        raise UsageError(f"OUT '{out}' is a {kind}", hint=_ANOTHER)
    _check_not_in_use(out, model)
    if not any(out.iterdir()):
        return
    foreign, lacking = contents.foreign(out), contents.lacks(out)
    if foreign is not None or lacking is not None:
        why = f"it holds '{foreign}'" if foreign is not None else f"it has no {lacking}"
        raise UsageError(
            f"OUT '{out}' is not {contents.name} and is not replaced: {why}", hint=_ANOTHER
        )
    if not overwrite:
        raise UsageError(
            f"OUT '{out}' exists", hint="add --overwrite to replace it, or name another folder"
        )


def check_file(file: Path, *, overwrite: bool, suffixes: tuple[str, ...]) -> None:
    """`file` must be absent in an existing folder or, with `overwrite`, be a plain file of a kind.

    Args:
        file: the file to write.
        overwrite: whether it may be replaced.
        suffixes: what such files end in; nothing else is replaced.

    Raises:
        UsageError: anything else.
    """
    kind = _kind_of(file)
    if kind is None:
        if not file.absolute().parent.is_dir():
            raise UsageError(
                f"cannot write '{file}': there is no folder '{file.parent}'",
                hint="make the folder first, or name another file",
            )
        return
    if kind != "file":
        raise UsageError(f"'{file}' is a {kind}", hint="name a file that does not exist yet")
    if not overwrite:
        raise UsageError(f"'{file}' exists", hint="give --overwrite, or another file name")
    if file.suffix.lower() not in suffixes:
        raise UsageError(
            f"'{file}' exists and is not replaced: it does not end in {' or '.join(suffixes)}",
            hint="name a file that does not exist yet",
        )


def check_not_inside(out: Path, model: Path | None, flag: str = "") -> None:
    """Raises UsageError where `out` would be added to the model's folder, or to a model of ours.

    Other programs read or keep that, and a model of ours could not be replaced any more. Links are
    followed. `flag` names another `out`, where the user did not name this one.
    """
    kept = None if model is None else model.resolve()
    place = _followed(out)
    for folder in place.parents:
        if folder == kept:
            which = "the model's own folder"
        elif of := _of_ours(folder, place.relative_to(folder).parts[0]):
            which = f"'{folder}', {of.name}"
        else:
            continue
        beside = folder.parent / out.name
        raise UsageError(
            f"OUT '{out}' lies inside {which}",
            hint=f"add {flag} {shlex.quote(str(beside))}, or run it from another folder"
            if flag
            else f"name one beside it: {beside}",
        )


def _of_ours(folder: Path, to_out: str) -> Contents | None:
    """What a folder is that nothing may be added to; `to_out` is its entry that leads to OUT.

    Files of ours may lie among somebody's work. config.json of a model tells it from settings;
    scorers and adapters have nothing of the kind, so they are alone there, and nobody's workplace.
    """
    if MODEL.is_in(folder):
        alone = MODEL.foreign(folder, to_out) is None
        return MODEL if alone or _names_a_model(folder / "config.json") else None
    kind = next((c for c in (SCORERS_ALONE, ADAPTERS) if c.is_in(folder)), None)
    if kind is None or kind.foreign(folder, to_out) is not None:
        return None
    workplace = folder == absolute("~").resolve() or Path.cwd().is_relative_to(folder)
    return None if workplace else kind


def _names_a_model(config: Path) -> bool:
    try:
        return b'"model_type"' in config.read_bytes()
    except OSError:
        return False


def _followed(path: Path) -> Path:
    """Where `path` is once all links are followed."""
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:  # the latter of links in a circle
        raise UsageError(
            f"'{path}' cannot be written: its links lead nowhere", hint=_ANOTHER
        ) from error


def check_local(path: str) -> None:
    """Raises UsageError as `check_name`, and for an address, which would become folders here.

    Who writes hf://me/model or s3://bucket/model believes that it was sent there. States of chat,
    which are read, too, are named alike.
    """
    check_name(path)
    if address := _ADDRESS.match(path):
        raise UsageError(
            f"'{path}' is an address, and what stands here is read and written on this machine",
            hint="name a place here; `sparsek push FOLDER owner/name` sends a folder to the hub"
            if address[1].lower() in ("hf", "http", "https")
            else "name a place here, and copy to it or from it yourself",
        )


def absolute(path: str | os.PathLike) -> Path:
    """From the root on, `~` followed, links not.

    Raises:
        UsageError: the name is empty, an address, or no text, so that no recipe or card could
            record it.
    """
    check_local(os.fspath(path))
    found = os.path.abspath(os.path.expanduser(path))
    check_name(found)
    return Path(found)


def _kind_of(path: Path) -> str | None:
    """What lies there, links not followed: None, "folder", "symbolic link", "file", "FIFO"..."""
    try:
        mode = path.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"'{path}' cannot be written: {why}", hint=_ANOTHER) from error
    if stat.S_ISLNK(mode):
        return f"symbolic link (to '{os.readlink(path)}')"
    return kind_of(mode)


def _check_length(out: Path) -> None:
    """Refused now, not when hours of work are to be written beside OUT under a longer name."""
    most = 255 - BESIDE  # bytes of a name on the file systems in use
    if len(os.fsencode(out.name)) > most:
        raise UsageError(
            f"OUT '{out}' cannot be written: its name is longer than {most} bytes",
            hint="name another folder as OUT, with a shorter name",
        )


def _check_parents(out: Path) -> None:
    above = next(parent for parent in out.parents if os.path.lexists(parent))
    if not above.is_dir():
        raise UsageError(
            f"OUT '{out}' cannot be made: '{above}' is no folder", hint="name another folder as OUT"
        )


def _check_not_in_use(out: Path, model: Path | None) -> None:
    real = out.resolve()
    if model is not None and model.resolve().is_relative_to(real):
        raise UsageError(
            f"OUT '{out}' is, or holds, the base model", hint="name another folder as OUT"
        )
    if real == Path(real.anchor):
        raise UsageError(f"OUT '{out}' is the root of the file system", hint=_ANOTHER)
    if absolute("~").resolve().is_relative_to(real):
        raise UsageError(f"OUT '{out}' is, or holds, your home", hint=_ANOTHER)
    if Path.cwd().is_relative_to(real):
        raise UsageError(f"OUT '{out}' is, or holds, the folder you are in", hint=_ANOTHER)
    if os.path.ismount(out):
        raise UsageError(f"OUT '{out}' is a mount point", hint="name a folder inside it")
