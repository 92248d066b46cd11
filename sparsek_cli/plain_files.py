"""What stands where a file is expected.

A pipe or a device passes for an absent file (`Path.is_file`), and whoever opens it all the same
waits for ever; a link to nothing passes for one, too.
"""

import os
import stat
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from sparsek_cli.errors import UsageError

_KINDS = (
    (stat.S_ISREG, "file"),
    (stat.S_ISDIR, "folder"),
    (stat.S_ISFIFO, "FIFO"),
    (stat.S_ISSOCK, "socket"),
    (stat.S_ISCHR, "character device"),
    (stat.S_ISBLK, "block device"),
)
_POINTER = b"version https://git-lfs.github.com/spec/"
_LONGEST_POINTER = 1024  # bytes, by its specification


def kind_of(mode: int) -> str:
    """What `st_mode` stands for, in a word."""
    return next((name for test, name in _KINDS if test(mode)), "special file")


def check_plain(file: Path, *, hint: str) -> None:
    """Raises UsageError where something is there that is no plain file, links followed."""
    try:
        mode = file.stat().st_mode
    except OSError:
        if not file.is_symlink():
            return
        raise UsageError(
            f"'{file}' is a link to a file that is gone: '{os.readlink(file)}'", hint=hint
        ) from None
    if not stat.S_ISREG(mode):
        kind = kind_of(mode)
        raise UsageError(f"'{file}' is a {kind}, and a plain file is expected", hint=hint)


def check_no_pointer(file: Path) -> None:
    """Raises UsageError where a file is what git leaves in place of a large one.

    Of a text file it would be the text, and a template of it renders.
    """
    try:
        if file.stat().st_size > _LONGEST_POINTER or not file.is_file():
            return
        with file.open("rb") as opened:
            begin = opened.read(len(_POINTER))
    except OSError:  # whoever reads it says so
        return
    if begin == _POINTER:
        raise UsageError(
            f"{file} is a pointer of Git LFS, not the file itself",
            hint="run `git lfs install` and `git lfs pull` in its folder, or download the file",
        )


def check_entries(folder: Path, patterns: Sequence[str], *, hint: str) -> None:
    """Raises UsageError where something in a folder is called as a file is, and is none.

    What a name that begins with a dot hides is nobody's to read: an editor locks config.json by
    a link `.#config.json` to nothing.
    """
    for file in sorted(folder.iterdir()):  # not glob, which passes over links to nothing
        hidden = file.name.startswith(".")
        if not hidden and any(fnmatchcase(file.name, pattern) for pattern in patterns):
            check_plain(file, hint=hint)
            check_no_pointer(file)


def utf8_text(file: Path) -> str:
    """A file's text.

    Raises:
        UsageError: it is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{file} is not UTF-8 text (byte {error.start})",
            hint="save it as UTF-8, or remove it",
        ) from error
