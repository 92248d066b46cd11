"""Temporary folders that killed runs leave beside OUT: found, told from live ones, removed.

A folder that is being written is locked by its owner; the system lets go when the owner dies, by
kill -9 too. So the next run knows what nobody will finish: `.OUT.xxxxxxxx.part` is removed, and
`.OUT.old.xxxxxxxx.part`, in which an OUT to be replaced stood aside, gives it back.
"""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from sparsek_cli.output.contents import MODEL, Contents
from sparsek_cli.output.place import absolute


def make_beside(out: Path, middle: str = "") -> Path:
    """A new private folder `.OUT.{middle}xxxxxxxx.part` beside OUT."""
    return Path(tempfile.mkdtemp(prefix=f".{out.name}.{middle}", suffix=".part", dir=out.parent))


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """The folder is ours within the block, and seen to be.

    Raises:
        BlockingIOError: another process holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(_CannotLock):
            _lock(descriptor)
        yield
    finally:
        os.close(descriptor)


def clear(out: Path, say: Callable[[str], None], contents: Contents = MODEL) -> None:
    """Removes or puts back what dead owners left beside OUT, and says so.

    Args:
        contents: what this tool writes there.

    Raises:
        OSError: a folder cannot be moved or removed.
    """
    out = absolute(out)
    name = re.compile(rf"\.{re.escape(out.name)}\.(old\.)?[a-z0-9_]{{8}}\.part")
    if not out.parent.is_dir():
        return
    for left in sorted(out.parent.iterdir()):
        match = name.fullmatch(left.name)
        if match and left.is_dir() and not left.is_symlink() and _abandoned(left):
            _settle(left, out, say, contents, aside=match[1] is not None)


def _settle(
    left: Path, out: Path, say: Callable[[str], None], contents: Contents, *, aside: bool
) -> None:
    inner = left / out.name if aside else left
    if aside and inner.is_dir() and not os.path.lexists(out):
        inner.rename(out)
        left.rmdir()
        say(f"put back {out}: a killed run had set it aside")
    elif inner.is_dir() and contents.foreign(inner) is not None:
        say(f"{left} is of no run that is still there, and holds files of others: look into it")
    else:
        shutil.rmtree(left)
        say(f"removed {left}: a killed run left it")


def _abandoned(folder: Path) -> bool:
    """Whether nobody holds it; False where that cannot be known."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        _lock(descriptor)
    except (BlockingIOError, _CannotLock):
        return False
    finally:
        os.close(descriptor)
    return True


class _CannotLock(Exception):
    """This system or file system has no such locks on folders."""


def _lock(descriptor: int) -> None:
    try:
        import fcntl
    except ImportError as error:
        raise _CannotLock from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        raise _CannotLock from error
