"""`sparsek serve` on vLLM: many clients, none of which gets another's reply; Ctrl-C ends it."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("openai")
sys.path.insert(0, str(Path(__file__).parents[1]))


@pytest.fixture
def server(checkpoint):
    """(process, its URL) of a server that answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = ["--enforce-eager", "--max-num-seqs", "8", "--max-model-len", "512"]
    process = subprocess.Popen(
        [
            sys.executable, "-m", "sparsek_cli", "serve", str(checkpoint("qwen3")),
            "--engine", "vllm", "--port", str(port), "--dtype", "float32", "--",
            *flags, "--gpu-memory-utilization", "0.2", "--num-gpu-blocks-override", "64",
        ],
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        start_new_session=True,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}/v1"
    try:
        while True:
            assert process.poll() is None, "the server ended before it answered"
            try:
                urllib.request.urlopen(f"{url}/models", timeout=5).read()
                break
            except OSError:
                time.sleep(2)
        yield process, url
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_clients_get_their_own_replies_and_interrupt_ends_it(server):
    import load

    process, url = server
    options = {"url": url, "model": None, "clients": 16, "seconds": 10, "words": 40, "tokens": 6}
    found = load.run(argparse.Namespace(**options, pid=process.pid))
    assert found["ok"], found
    assert found["distinct_replies"] > 8, "all replies are alike: a mixed one would not be seen"
    assert found["requests"]["answered"] > 16 and found["requests"]["left"] > 0
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=120) in (0, 130, -signal.SIGINT)
