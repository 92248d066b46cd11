"""Disks: names, whole files, room, and what a full one looks like in whichever library wrote."""

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sparsek_cli.errors import UsageError

HALF_WRITTEN = re.compile(r"\..+\.[0-9]+\.part")  # names of what a kill leaves of an atomic write
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


@contextmanager
def os_errors() -> Iterator[None]:
    """safetensors wraps what the system said in an error of its own; here it is an OSError again.

    Raises:
        OSError: with the errno that the message of a SafetensorError names.
    """
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        found = _OS_ERROR.search(str(error))
        if found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number)) from error


def write_atomically(file: Path, content: str | bytes) -> None:
    """Puts `content` at `file` by one rename; a crash leaves the old file or none.

    What a killed run left of the same file is removed.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        if isinstance(content, bytes):
            part.write_bytes(content)
        else:
            part.write_text(content, encoding="utf-8")
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
    _remove_abandoned(file)


@contextmanager
def part_of(file: Path) -> Iterator[Path]:
    """Yields where to write what is then to get the name `file`, by the caller; removed after.

    It lies in a private folder beside it: safetensors, killed, leaves a file of a name of its own.
    What a killed run left of the same file is removed, too.

    Raises:
        OSError: the folder cannot be made.
    """
    folder = Path(tempfile.mkdtemp(".part", f".{file.name}.{os.getpid()}.", file.parent))
    try:
        yield folder / file.name
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    _remove_abandoned(file)


def _remove_abandoned(file: Path) -> None:
    """Removes parts of `file` whose process is gone; what cannot be removed stays."""
    name = re.compile(rf"\.{re.escape(file.name)}\.(\d+)(\.\w{{8}})?\.part")
    with suppress(OSError):
        for entry in list(os.scandir(file.parent)):
            match = name.fullmatch(entry.name)
            if match is None or entry.is_symlink() or not _is_gone(int(match[1])):
                continue
            if match[2] and entry.is_dir():
                shutil.rmtree(entry.path, ignore_errors=True)
            elif match[2] is None and entry.is_file():
                os.unlink(entry.path)


def _is_gone(process: int) -> bool:
    """Whether there is no such process; False where that cannot be known."""
    if os.name != "posix":  # elsewhere this would end it
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # somebody else's; no number of a process
        return False
    return False


def check_name(path: str) -> None:
    """Raises UsageError where a path is empty, or holds a null byte or bytes that are no UTF-8.

    Empty, it would be the current folder, which nobody means who gives a shell's unset variable.
    """
    if not path.strip():
        raise UsageError(
            "the name of a file or folder is empty",
            hint="name one; in a shell, the variable may not be set",
        )
    if "\0" in path:
        raise UsageError("the name holds a null byte", hint="name a file, a folder or a hub id")
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the name '{path}' is not valid UTF-8",
            hint="rename it; in a shell whose locale is C, set LANG=C.UTF-8 first",
        ) from error


def is_full(error: OSError) -> bool:
    """Whether space was what lacked: of the disk, or of the user's share of it."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def existing_parent(path: Path) -> Path:
    """The nearest folder above `path` that exists."""
    return next(parent for parent in path.absolute().parents if parent.is_dir())


def free_bytes(path: Path) -> int:
    """Room for a file at `path`, whose folders may still have to be made."""
    return shutil.disk_usage(existing_parent(path)).free


def size(folder: Path) -> int:
    """Bytes of all files below a folder; 0 if there is none."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def readable(file: Path, folder: Path | None = None) -> None:
    """safetensors makes private files; this one becomes as readable as its folder, or `folder`.

    Not more than any other new file: in /tmp, where everybody may write, weights could be changed.
    """
    file.chmod(((folder or file.parent).stat().st_mode & ~umask() | 0o600) & 0o666)


def umask() -> int:
    """The rights that new files and folders of this process do without."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
