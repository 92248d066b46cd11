"""How things look: results on stdout, progress and messages on stderr, colour only on a terminal.

Whatever a file or a model brings into a line passes `escaped`: nothing but our own colours can
steer the terminal.
Library code below commands/ never imports this file; it reports through a callback that a command
passes in, or through `logging`.
"""

import logging
import os
import sys
import time
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TextIO

PLAIN_INTERVAL = 15.0  # seconds between progress lines when stderr is not a terminal


def colourful(stream: TextIO) -> bool:
    """Whether `stream` is a terminal that wants colour (https://no-color.org)."""
    wanted = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return wanted and stream.isatty()


def open_closed_streams() -> None:
    """Streams that the caller closed (`>&-`) lead to the null device.

    Left closed, their numbers would go to the next files that are opened, and whatever a library
    prints would be written into those.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


def forget(stream: TextIO) -> None:
    """The reader is gone: the stream leads nowhere, or Python complains again when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def report_error(message: str, hint: str = "") -> None:
    """One `error:` line and at most one `hint:` line on stderr, where it can be written at all."""
    red, blue, end = ("\x1b[1;31m", "\x1b[1;36m", "\x1b[0m") if colourful(sys.stderr) else [""] * 3
    try:
        print(f"{red}error:{end} {_one_line(message)}", file=sys.stderr)
        if hint:
            print(f"{blue}hint:{end} {_one_line(hint)}", file=sys.stderr, flush=True)
    except OSError:
        forget(sys.stderr)


def _one_line(text: str) -> str:
    return escaped(" ".join(str(text).split("\n")))


# Left-to-right and right-to-left override; what Arabic and Hebrew need are marks and isolates.
_TURNING = "\u202d\u202e"


def escaped(text: str) -> str:
    """Control characters, which files may hold, as Python writes them; newline and tab stay.

    So are those that turn the order of what follows around: a name would read as another one.
    """
    return "".join(
        c if c in "\n\t" or c.isprintable()
        or (unicodedata.category(c) not in ("Cc", "Cs") and c not in _TURNING)
        else c.encode("unicode_escape", "surrogatepass").decode()
        for c in text
    )  # fmt: skip


def set_up_logging(arguments: Sequence[str] = ()) -> None:
    """Our own log on stderr; other libraries keep quiet unless -v or --debug is given."""
    talkative = {"-v", "--verbose", "--debug"} & set(arguments)
    ours, theirs = (logging.INFO, "warning") if talkative else (logging.WARNING, "error")
    if {"-q", "--quiet"} & set(arguments):
        ours = logging.ERROR
    handler = logging.StreamHandler()
    handler.setFormatter(_PlainFormatter())
    logging.basicConfig(level=theirs.upper(), handlers=[handler])
    logging.getLogger("sparsek_cli").setLevel(ours)
    logging.getLogger("sparsek_kernels").setLevel(ours)
    for library in ("TRANSFORMERS", "DATASETS", "HF_HUB", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", theirs)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if ours == logging.ERROR or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not talkative and not sys.warnoptions:
        import warnings

        warnings.simplefilter("ignore")


class _PlainFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = escaped(super().format(record))
        return text if record.levelno == logging.INFO else f"{record.levelname.lower()}: {text}"


class Console:
    """Output of one command: quiet, normal or verbose, for a person or as JSON."""

    def __init__(self, *, as_json: bool = False, quiet: bool = False, verbose: bool = False):
        self.as_json = as_json
        self.quiet = quiet
        self.verbose = verbose

    def say(self, text: str = "") -> None:
        """A line for the person watching; never part of the result."""
        if not self.quiet:
            try:
                print(escaped(text), file=sys.stderr, flush=True)
            except OSError:  # a log on a full disk, a reader that left: no reason to end a run
                forget(sys.stderr)

    def detail(self, text: str) -> None:
        """A line shown under -v."""
        if self.verbose:
            self.say(text)

    def result(self, text: str, data: Any) -> None:
        """The command's result: `data` as one JSON document under --json, else `text`."""
        if self.as_json:
            import json

            shown = json.dumps(data, indent=2, default=str)
        else:
            shown = escaped(text)
        print(shown, flush=True)

    def show(self, piece: str) -> None:
        """A part of a result that comes in pieces."""
        print(escaped(piece), end="", flush=True)

    @contextmanager
    def progress(
        self, description: str, total: float | None = None, *, logged: bool = False
    ) -> Iterator["Progress"]:
        """A progress bar with rate and time left on stderr; a line now and then when piped.

        Args:
            logged: the work says lines of its own: none of ours when piped.
        """
        if self.quiet or (logged and not sys.stderr.isatty()):
            yield Progress(description, total, lambda text: None)
            return
        if not sys.stderr.isatty():
            yield Progress(description, total, self.say)
            return
        from rich.console import Console as RichConsole
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with RichProgress(*columns, console=RichConsole(stderr=True), transient=True) as bar:
            yield _BarProgress(bar, bar.add_task(escaped(description), total=total, rate=""))


class Progress:
    """The handle a long-running function calls; `advance` may carry a rate to show."""

    def __init__(self, description: str, total: float | None, say: Any):
        self._description, self._total, self._say = description, total, say
        self._done = 0.0
        self._began = self._last = time.monotonic()

    def advance(self, steps: float = 1, *, rate: str | None = None) -> None:
        self._done += steps
        now = time.monotonic()
        if now - self._last >= PLAIN_INTERVAL:
            self._last = now
            of = f"/{self._total:g}" if self._total else ""
            after = rate or self._time_left(now)
            self._say(f"{self._description}: {self._done:g}{of}{'  ' + after if after else ''}")

    def _time_left(self, now: float) -> str:
        if not self._total or not self._done:
            return ""
        seconds = (now - self._began) * (self._total / self._done - 1)
        return f"{timedelta(seconds=round(seconds))} left"

    def describe(self, description: str, *, total: float | None = None) -> None:
        self._description = description
        if total is not None:
            self._total, self._done = total, 0.0
            self._began = time.monotonic()


class _BarProgress(Progress):
    def __init__(self, bar: Any, task: Any):
        self._bar, self._task = bar, task

    def advance(self, steps: float = 1, *, rate: str | None = None) -> None:
        fields = {} if rate is None else {"rate": rate}
        self._bar.update(self._task, advance=steps, **fields)

    def describe(self, description: str, *, total: float | None = None) -> None:
        shown = escaped(description)
        if total is None:
            self._bar.update(self._task, description=shown)
        else:
            self._bar.reset(self._task, description=shown, total=total, rate="")
