"""The progress protocol of all verbs, and one that shows nothing."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Bar(Protocol):
    """One piece of work under way."""

    def advance(self, steps: float = 1, *, rate: str | None = None) -> None:
        """`steps` more are done; `rate` is ready to be shown."""

    def describe(self, description: str, *, total: float | None = None) -> None:
        """Another name; with `total` another piece of work, from its start."""


class Reporter(Protocol):
    """Where lines and bars go; the command line's console is one."""

    def say(self, text: str = "") -> None:
        """A line for the person watching."""

    def detail(self, text: str) -> None:
        """A line for a person who asked for more."""

    def progress(
        self, description: str, total: float | None = None, *, logged: bool = False
    ) -> AbstractContextManager[Bar]:
        """A bar. `logged`: the work says lines of its own, so that a pipe needs no others."""


class Silent:
    """A reporter and a bar that show nothing."""

    def say(self, text: str = "") -> None:
        """Nothing."""

    def detail(self, text: str) -> None:
        """Nothing."""

    def advance(self, steps: float = 1, *, rate: str | None = None) -> None:
        """Nothing."""

    def describe(self, description: str, *, total: float | None = None) -> None:
        """Nothing."""

    @contextmanager
    def progress(
        self, description: str, total: float | None = None, *, logged: bool = False
    ) -> Iterator[Bar]:
        """A bar that shows nothing."""
        yield self
