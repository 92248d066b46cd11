"""Linking base weights: reflink, else hard link, else copy."""

import contextlib
import os
import shutil
from pathlib import Path
from typing import Literal

Means = Literal["reflink", "hard link", "symbolic link", "copy"]

# ioctl FICLONE from linux/fs.h: _IOW(0x94, 9, int); btrfs, XFS and overlays of them know it.
_FICLONE = 0x40049409


def link_or_copy(
    source: Path, target: Path, *, copy: bool = False, symbolic: bool = False
) -> Means:
    """Makes `target` hold the bytes of `source` as cheaply as the filesystem allows.

    Symbolic links (the hub's cache is made of them) are followed first, so that the new name
    stands for the weights themselves.

    Args:
        copy: copy even where it could be linked.
        symbolic: the last resort is a symbolic link, for a target that will not stay.

    Raises:
        OSError: the last resort, copying, failed (disk full, no permission).
    """
    source = source.resolve()
    if not copy:
        if _reflink(source, target):
            return "reflink"
        with contextlib.suppress(OSError):
            os.link(source, target)
            return "hard link"
    if symbolic:
        target.symlink_to(source)
        return "symbolic link"
    shutil.copyfile(source, target)
    return "copy"


def _reflink(source: Path, target: Path) -> bool:
    try:
        import fcntl
    except ImportError:
        return False
    with source.open("rb") as reader, target.open("wb") as writer:
        try:
            fcntl.ioctl(writer.fileno(), _FICLONE, reader.fileno())
            return True
        except OSError:
            pass
    target.unlink()
    return False
