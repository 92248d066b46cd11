"""Programs that import transformers and nothing of ours, each in a process of its own.

One process imports torch and transformers and forks for each program: what it does from there is
what `python -c` would do, without the seconds of imports. A program that is about what happens
while transformers is imported needs a Python of its own.
"""

from __future__ import annotations

import gc
import json
import os
import select
import subprocess
import sys
from pathlib import Path

# As `patience.PATIENCE`: run as a program, this file finds no other of ours.
SECONDS = 600


class CleanPrograms:
    """Runs programs one after the other; the first one starts the process that forks."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._server: subprocess.Popen[str] | None = None

    def __call__(self, code: str) -> subprocess.CompletedProcess[str]:
        """Exit code, stdout and stderr of the program `code`; its stdin is empty."""
        server = self._started()
        server.stdin.write(json.dumps([code, str(self._folder)]) + "\n")
        server.stdin.flush()
        if not select.select([server.stdout], [], [], SECONDS)[0]:
            self.close()
            raise TimeoutError(f"no end after {SECONDS} seconds:\n{code}")
        answer = server.stdout.readline()
        assert answer, (self._folder / "server").read_text()
        streams = [(self._folder / name).read_text() for name in ("stdout", "stderr")]
        return subprocess.CompletedProcess(code, json.loads(answer), *streams)

    def _started(self) -> subprocess.Popen[str]:
        if self._server is None:
            # Read when transformers is imported.
            own = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(self._folder / "modules")}
            own["HF_DEACTIVATE_ASYNC_LOAD"] = "0"  # weights are read as users read them
            with (self._folder / "server").open("w") as log:
                self._server = subprocess.Popen(
                    [sys.executable, "-P", __file__], text=True, env={**os.environ, **own},
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                )  # fmt: skip
        return self._server

    def close(self) -> None:
        """Ends the process that forks, if there is one."""
        if self._server is not None:
            self._server.kill()
            self._server.communicate()
            self._server = None


def _serve() -> None:
    from transformers import (  # noqa: F401
        AutoModelForCausalLM,
        AutoTokenizer,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

    assert not [name for name in sys.modules if name.startswith("sparsek")]
    gc.collect()
    gc.freeze()  # each fork would look through all of this, and copy it by that
    sys.path.insert(0, "")
    for line in sys.stdin:
        child = os.fork()
        if not child:
            _run(*json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _run(code: str, folder: str) -> None:
    """In the fork: never returns."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    ended = 0
    try:
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    except BaseException:
        import traceback

        traceback.print_exc()
        ended = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(ended)


if __name__ == "__main__":
    _serve()
