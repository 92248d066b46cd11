"""A folder that appears whole or not at all."""

import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from sparsek_cli.errors import SparsekError


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """Yields an empty sibling folder; on success it takes the name `out` in one rename.

    An `out` that exists is replaced only then. On any failure, Ctrl-C or SIGTERM the sibling and
    the parents made for it are removed and `out` is as before.

    Raises:
        SparsekError: the folder cannot be made (no permission, disk full).
    """
    made = [parent for parent in out.parents if not parent.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        sibling = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.parent))
        # mkdtemp makes private folders; a checkpoint is as readable as any other new folder.
        sibling.chmod(0o777 & ~_umask())
    except OSError as error:
        _remove_empty(made)
        raise SparsekError(
            f"cannot write in {out.parent}: {error.strerror}",
            hint="check its permissions and free space, or choose another OUT",
        ) from error
    try:
        with _terminate_as_interrupt():
            yield sibling
            _take_name(sibling, out)
    except BaseException:
        shutil.rmtree(sibling, ignore_errors=True)
        _remove_empty(made)
        raise


def _take_name(sibling: Path, out: Path) -> None:
    if not out.exists():
        sibling.rename(out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old.", suffix=".part", dir=out.parent))
    out.rename(old / out.name)
    try:
        sibling.rename(out)
    except BaseException:
        (old / out.name).rename(out)
        old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


def _remove_empty(parents: list[Path]) -> None:
    for parent in parents:
        with contextlib.suppress(OSError):
            parent.rmdir()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM as KeyboardInterrupt, so that both clean up; only the main thread may set it."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
