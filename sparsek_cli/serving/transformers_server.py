"""`python -m sparsek_cli.serving.transformers_server`: transformers' server, as `serve` starts it.

Left alone it calls Ctrl-C a failure and waits for whatever is being written, a refusal of ours
becomes a traceback, /v1/models lists the hub's cache on this machine, and any client may have it
load another model (`guard.py`). All arguments are those of `transformers`, and `--yarn FACTOR`
(`stretched.py`).
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from contextlib import suppress

from sparsek_cli.console import report_error
from sparsek_cli.errors import INTERRUPTED
from sparsek_cli.serving import module
from sparsek_cli.serving.guard import (
    draw_where_asked,
    guarded,
    leave_prompts_open,
    refuse_longer_prompts,
)
from sparsek_cli.serving.stretched import stretch_what_it_loads, take_factor

HINT = "the traceback says where; flags after -- go to the server as they are"
UNHEARD = "the error above says why; where the address is in use, give another --port"
PATIENCE = 5  # seconds that Ctrl-C gives to replies that are being written


def _watched(server: type, serving: list[bool]) -> type:
    """uvicorn's class with a guard, which notes in `serving` that it serves, and ends `PATIENCE`
    after Ctrl-C.

    SIGTERM comes from whoever restarts servers, and kills them after a time of its own: until
    then replies are written to their end.
    """

    class Watched(server):
        def run(self, *args, **kwargs):
            serving.append(True)
            self.config.app = guarded(self.config.app)
            try:
                return super().run(*args, **kwargs)
            except SystemExit as end:  # uvicorn's, where it cannot listen
                if end.code:
                    report_error("the server ended before it served", UNHEARD)
                raise

        def handle_exit(self, sig, frame):
            if sig == signal.SIGINT:
                self.config.timeout_graceful_shutdown = PATIENCE
            return super().handle_exit(sig, frame)

    return Watched


def _lists_what_it_serves(manager: type) -> None:
    """Makes /v1/models name the one model that a server was started with.

    Args:
        manager: transformers' `ModelManager`.
    """
    started = int(time.time())

    def models(self) -> list[dict]:
        named = {"id": self.force_model, "object": "model", "created": started}
        return [{**named, "owned_by": "sparsek"}]

    manager.get_gen_models = models


def main() -> int:
    """Serves until it is ended; returns the exit code."""
    import uvicorn

    factor = take_factor(sys.argv)
    serving: list[bool] = []
    uvicorn.Server = _watched(uvicorn.Server, serving)

    def end(_number, _frame) -> None:
        # While it serves uvicorn listens itself, and hands the signal on once it has ended.
        if not serving:
            report_error("interrupted before it served", "run the same command again")
        raise SystemExit(0 if serving else INTERRUPTED)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    from transformers.cli.serving.model_manager import ModelManager  # takes seconds
    from transformers.cli.serving.utils import BaseHandler, GenerateManager

    import sparsek_cli.models  # noqa: F401  (so that no code of the folder needs to be run)

    _lists_what_it_serves(ModelManager)
    if factor is not None:
        stretch_what_it_loads(ModelManager, factor)
    leave_prompts_open(ModelManager)
    draw_where_asked(BaseHandler)
    refuse_longer_prompts(GenerateManager)
    return module.run("transformers.cli.transformers", HINT) or 0


def _exit() -> None:
    """Ends the process with `main`'s code, and with it threads that still write a reply.

    Python would wait for them, without end where a reply has none: whatever `main` ended with, and
    whether or not anybody still reads what is said.
    """
    code: object = 1
    try:
        code = main()
    except SystemExit as end:
        code = end.code
    except BaseException:
        with suppress(OSError):
            traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    _exit()
