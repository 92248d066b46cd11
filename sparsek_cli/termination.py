"""SIGTERM as Ctrl-C: who ends a run from outside finds what a person's Ctrl-C leaves."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_resumable = False


def note_resumable() -> None:
    """Of what is being interrupted something stays that --resume goes on from."""
    global _resumable
    _resumable = True


def was_resumable() -> bool:
    """Whether that was noted since the last call."""
    global _resumable
    noted, _resumable = _resumable, False
    return noted


class Terminated(KeyboardInterrupt):
    """SIGTERM came. Where Ctrl-C ends less than the process, this ends the process."""


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Within the block SIGTERM raises `Terminated` in the main thread.

    Only where it would kill the process: who listens to it, or ignores it, goes on doing so.
    """
    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    )
    if not ours:
        yield
        return
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def sigterm_kills() -> None:
    """Back to the system's way, for a process that has nothing to tidy and may hang in others'."""
    if signal.getsignal(signal.SIGTERM) is _interrupt:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise Terminated
