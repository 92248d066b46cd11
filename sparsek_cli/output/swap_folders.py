"""Two folders swap their names in one step, where the system can."""

import ctypes
import errno
import os
from functools import lru_cache
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
# What file systems and kernels without it answer.
_UNKNOWN = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


def exchange(first: Path, second: Path) -> bool:
    """Swaps what the two paths name; no moment passes in which one of them is absent.

    Returns:
        False where the system cannot; nothing has changed then.

    Raises:
        OSError: it can, and failed.
    """
    rename = _renameat2()
    if rename is None:
        return False
    paths = os.fsencode(first), os.fsencode(second)
    if rename(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNKNOWN:
        return False
    raise OSError(number, os.strerror(number), str(first), None, str(second))


@lru_cache(maxsize=1)
def _renameat2() -> "ctypes._NamedFuncPointer | None":
    """The C library's function of that name; Linux only."""
    try:
        function = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return None
    text, number = ctypes.c_char_p, ctypes.c_int
    function.argtypes = [number, text, number, text, ctypes.c_uint]
    function.restype = number
    return function
