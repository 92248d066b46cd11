"""`python -m sparsek_cli.serving.transformers_server`: transformers' server, as `serve` starts it.

Left alone it calls Ctrl-C a failure, and a refusal of ours becomes a traceback. All arguments are
those of `transformers`.
"""

from __future__ import annotations

import runpy
import signal
import sys

from sparsek_cli.console import report_error
from sparsek_cli.errors import INTERRUPTED, refusal


def _watched(server: type, serving: list[bool]) -> type:
    """uvicorn's class, which notes in `serving` that it serves."""

    class Watched(server):
        def run(self, *args, **kwargs):
            serving.append(True)
            return super().run(*args, **kwargs)

    return Watched


def main() -> int:
    """Serves until it is ended; returns the exit code."""
    import uvicorn

    serving: list[bool] = []
    uvicorn.Server = _watched(uvicorn.Server, serving)

    def end(_number, _frame) -> None:
        # While it serves uvicorn listens itself, and hands the signal on once it has ended.
        if not serving:
            report_error("interrupted before it served", "run the same command again")
        raise SystemExit(0 if serving else INTERRUPTED)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    try:
        runpy.run_module("transformers.cli.transformers", run_name="__main__", alter_sys=True)
    except Exception as error:
        found = refusal(error)
        if found is None:
            raise
        report_error(found.message, found.hint)
        return found.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
