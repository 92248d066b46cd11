"""How things look: results on stdout, progress and messages on stderr, colour only on a terminal.

Library code below commands/ never imports this file; it reports through a callback that a command
passes in, or through `logging`.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Console:
    """Output of one command: quiet, normal or verbose, for a person or as JSON."""

    def __init__(self, *, as_json: bool = False, quiet: bool = False, verbose: bool = False):
        self.as_json = as_json
        self.quiet = quiet
        self.verbose = verbose

    def say(self, text: str = "") -> None:
        """A line for the person watching; never part of the result."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def detail(self, text: str) -> None:
        """A line shown under -v."""
        if self.verbose:
            self.say(text)

    def result(self, text: str, data: Any) -> None:
        """The command's result: `data` as one JSON document under --json, else `text`."""
        print(json.dumps(data, indent=2, default=str) if self.as_json else text, flush=True)

    @contextmanager
    def progress(self, description: str, total: float | None = None) -> Iterator["Progress"]:
        """A progress bar with rate and time left on stderr; plain silence when not a terminal."""
        from rich.console import Console as RichConsole
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as RichProgress

        err = RichConsole(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        disable = self.quiet or not err.is_terminal
        with RichProgress(*columns, console=err, disable=disable, transient=True) as bar:
            yield Progress(bar, bar.add_task(description, total=total, rate=""))


class Progress:
    """The handle a long-running function calls; `advance` may carry a rate to show."""

    def __init__(self, bar: Any, task: Any):
        self._bar, self._task = bar, task

    def advance(self, steps: float = 1, *, rate: str | None = None) -> None:
        fields = {} if rate is None else {"rate": rate}
        self._bar.update(self._task, advance=steps, **fields)

    def describe(self, description: str, *, total: float | None = None) -> None:
        fields = {} if total is None else {"total": total}
        self._bar.update(self._task, description=description, **fields)
