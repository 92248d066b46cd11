"""Ctrl-C between two forwards, so that none stops half way."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Ctrl-C sets the event, so that no forward stops half way and the cache stays whole.

    A second Ctrl-C is a real one. Nested uses share the outer event.
    """
    event = _current.get("event")
    if event is not None or threading.current_thread() is not threading.main_thread():
        yield event or threading.Event()
        return
    event = threading.Event()
    previous = signal.getsignal(signal.SIGINT)

    def stop(signum: int, frame: object) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    signal.signal(signal.SIGINT, stop)
    _current["event"] = event
    try:
        yield event
    finally:
        _current.pop("event", None)
        signal.signal(signal.SIGINT, previous)


_current: dict[str, threading.Event] = {}
