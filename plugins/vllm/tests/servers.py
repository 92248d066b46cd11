"""A server of `sparsek serve`, started for a test and ended with all that it started."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import openai

LONGEST = 512
# A grammar would else allow any number of blanks, of which a random model is fond.
RULES = {"backend": "xgrammar", "disable_any_whitespace": True}


@dataclass(frozen=True)
class Server:
    """A server that runs: its process, what clients take as base URL, and the file of its words."""

    process: subprocess.Popen
    url: str
    log: Path

    @property
    def api(self):
        return openai.OpenAI(base_url=self.url, api_key="none", timeout=300, max_retries=0)


FLAGS = {
    "vllm": (
        "--enforce-eager", "--max-num-seqs", "8", "--max-model-len", str(LONGEST),
        "--structured-outputs-config", json.dumps(RULES),
        "--gpu-memory-utilization", "0.2", "--num-gpu-blocks-override", "64",
    ),
    "transformers": (),
}  # fmt: skip


def free_port() -> int:
    """A port that nobody listened on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def launched(folder: Path, log: Path, engine: str = "vllm") -> Iterator[Server]:
    """A server that does not answer yet; killed afterwards where it still runs."""
    port = free_port()
    with log.open("w") as words:
        process = subprocess.Popen(
            [
                sys.executable, "-m", "sparsek_cli", "serve", folder.name,
                "--engine", engine, "--port", str(port), "--dtype", "float32", "--",
                *FLAGS[engine],
            ],
            cwd=folder.parent,
            env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
            start_new_session=True, stdout=words, stderr=words,
        )  # fmt: skip
    server = Server(process, f"http://127.0.0.1:{port}/v1", log)
    try:
        yield server
    finally:
        for pid in members(server):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


@contextmanager
def started(folder: Path, log: Path, engine: str = "vllm") -> Iterator[Server]:
    """A server that answers; killed afterwards where it still runs."""
    with launched(folder, log, engine) as server:
        while True:
            ended = server.process.poll() is not None
            assert not ended, f"it ended before it answered: {log.read_text()[-3000:]}"
            try:
                urllib.request.urlopen(f"{server.url.removesuffix('/v1')}/health", timeout=5).read()
                break
            except OSError:
                time.sleep(1)
        yield server


def complete(server: Server, **asked):
    """A reply of 16 tokens to one and the same question, unless told otherwise."""
    [model] = server.api.models.list().data
    told = [{"role": "user", "content": "What colour is the door? " * 3}]
    return server.api.chat.completions.create(
        **{"model": model.id, "messages": told, "max_tokens": 16, "temperature": 0, **asked}
    )


def members(server: Server) -> dict[int, str]:
    """Every process of the server's session that runs: its id and its name."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            head, _, rest = stat.read_text().rpartition(")")
        except OSError:  # it ended just now
            continue
        state, _, _, session = rest.split()[:4]
        if int(session) == server.process.pid and state != "Z":
            found[int(head.split()[0])] = head.partition("(")[2]
    return found
