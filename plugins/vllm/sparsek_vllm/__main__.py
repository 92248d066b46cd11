"""`python -m sparsek_vllm`: vLLM's OpenAI server in a process of its own, which is seen to its end.

vLLM exits with 0 whether it was asked to end or its engine died, and leaves processes behind where
it is killed. This process asks it to end when told to, tells the two apart, and ends whatever
stays. All arguments are vLLM's own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping

from sparsek_cli.console import report_error
from sparsek_vllm.allocator import choice
from sparsek_vllm.server import AGAIN, SERVED

PATIENCE = 5.0  # seconds for the server's processes to end after it
# On a CPU oneDNN keeps what it compiled for every number of tokens that a step had, 1024 of them:
# for minutes memory grows with each new number. So many serve the matrices of one step as well.
COMPILED = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128"}


def main() -> int:
    """Serves until it is ended, at once by a second signal; returns the exit code."""
    asked: list[int] = []
    server: subprocess.Popen | None = None

    def end(number: int, _frame) -> None:
        if number != signal.SIGALRM:
            asked.append(number)
        if server is not None and len(asked) > 1:
            _signal_group(server.pid, signal.SIGKILL)
        elif server is not None:
            server.terminate()
        signal.alarm(AGAIN)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, end)
    # A group of its own: a terminal's Ctrl-C reaches it by way of this process alone.
    command = [sys.executable, "-m", "sparsek_vllm.server", *sys.argv[1:]]
    surroundings = environment(os.environ)
    server = subprocess.Popen(command, stdin=subprocess.PIPE, process_group=0, env=surroundings)
    code = server.wait()
    signal.alarm(0)
    _end_group(server.pid)
    return outcome(code, bool(asked))


def environment(given: Mapping[str, str]) -> dict[str, str]:
    """The server's: as given, and where nothing is said about it, so that memory stays flat."""
    return {**COMPILED, **given, **choice(given)[0]}


def outcome(code: int, asked: bool) -> int:
    """The exit code for a server's own, and where nobody asked it to end, why it is not 0."""
    if code == SERVED:
        if asked:
            return 0
        report_error("vLLM's engine died, and the server with it", "see above why; start it again")
        return 1
    if code >= 0:  # it said itself why
        return code
    if not asked:
        name = signal.Signals(-code).name
        report_error(f"vLLM's server was killed ({name})", "out of memory? then fewer sequences")
    return 128 - code


def _signal_group(group: int, number: int) -> bool:
    """Whether any process of the group was there to get the signal."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


def _end_group(group: int) -> None:
    """Ends what a server left behind, after a while in which it may end by itself."""
    end = time.monotonic() + PATIENCE
    while _signal_group(group, 0):
        if time.monotonic() > end:
            _signal_group(group, signal.SIGKILL)
            return
        time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
