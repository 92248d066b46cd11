"""What Python callers give: of the kind that is documented, or an error that names the argument."""

import sys
from collections.abc import Iterable
from numbers import Integral, Real
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

from sparsek_cli.errors import UsageError
from sparsek_cli.reporter import Reporter

if TYPE_CHECKING:
    import torch

Place = str | PathLike[str]


def place(name: str, value: object) -> str:
    """A path, short name or hub id as text."""
    found = fspath(value) if isinstance(value, PathLike) else value
    if not isinstance(found, str):
        raise _wrong(name, value, "a path or a name")
    return str(found)  # NumPy's text is a kind of str, which YAML does not write


def places(name: str, value: object) -> list[str]:
    """One `place`, or each of what can be walked through: a glob, a set, an array of NumPy."""
    several = isinstance(value, Iterable) and not isinstance(value, str | PathLike)
    return [place(name, each) for each in (value if several else [value])]


def place_or_none(name: str, value: object) -> str | None:
    """`place` of what may be left out."""
    return None if value is None else place(name, value)


def device(value: object) -> "str | torch.device":
    """What `choose_device` takes: text, a torch.device, or torch's own number of a GPU."""
    torch = sys.modules.get("torch")  # who holds a device of it has imported it
    if isinstance(value, str) or (torch is not None and isinstance(value, torch.device)):
        return value
    if isinstance(value, Integral) and not isinstance(value, bool):
        return f"cuda:{value}"
    raise _wrong("device", value, "auto, cpu, cuda, cuda:N or a torch.device")


def check_switches(**given: object) -> None:
    """Raises UsageError for what is neither true nor false: overwrite="no" replaced a folder."""
    for name, value in given.items():
        if not isinstance(plain(value), bool):
            raise _wrong(name, value, "True or False")


def check_words(**given: object) -> None:
    """Raises UsageError for what is neither text nor left out."""
    for name, value in given.items():
        if not isinstance(value, str | None):
            raise _wrong(name, value, "text")


def check_numbers(**given: object) -> None:
    """Raises UsageError for what is no number."""
    for name, value in given.items():
        if not isinstance(value, Real) or isinstance(value, bool):
            raise _wrong(name, value, "a number")


def check_counts(**given: object) -> None:
    """Raises UsageError for what is no whole number."""
    for name, value in given.items():
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise _wrong(name, value, "a whole number")


def check_reporter(reporter: object) -> None:
    """Raises UsageError for what cannot be told how a verb goes on."""
    methods = [name for name in vars(Reporter) if not name.startswith("_")]
    if reporter is not None and not all(hasattr(reporter, name) for name in methods):
        raise _wrong("reporter", reporter, f"an object with {', '.join(methods)}")


def plain(value: Any) -> Any:
    """A setting whose numbers are Python's: those of NumPy, and its arrays, count as such.

    torch's own names of number formats and devices are text.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.dtype | torch.device):
        return str(value).removeprefix("torch.")
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {plain(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        parts = [plain(part) for part in value]
        return tuple(parts) if isinstance(value, tuple) else parts
    return value


def _wrong(name: str, value: object, wanted: str) -> UsageError:
    shown = " ".join(repr(value).split())  # a model's is many lines
    return UsageError(
        f"{name} should be {wanted}, not {shown:.60}",
        hint=f"`help(sparsek.convert)`, or of another function, says what {name} may be",
    )
