"""`sparsek serve` on vLLM: the OpenAI API, many clients, and how a server ends."""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

openai = pytest.importorskip("openai")
sys.path.insert(0, str(Path(__file__).parents[1]))

LONGEST = 512
COLOURS = ["red", "green"]
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
        return openai.OpenAI(base_url=self.url, api_key="none", timeout=120, max_retries=0)


@contextmanager
def started(folder: Path, log: Path) -> Iterator[Server]:
    """A server that answers; killed afterwards where it still runs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = ["--enforce-eager", "--max-num-seqs", "8", "--max-model-len", str(LONGEST)]
    with log.open("w") as words:
        process = subprocess.Popen(
            [
                sys.executable, "-m", "sparsek_cli", "serve", str(folder),
                "--engine", "vllm", "--port", str(port), "--dtype", "float32", "--",
                *flags, "--structured-outputs-config", json.dumps(RULES),
                "--gpu-memory-utilization", "0.2", "--num-gpu-blocks-override", "64",
            ],
            env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
            start_new_session=True, stdout=words, stderr=words,
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}/v1"
    try:
        while True:
            assert process.poll() is None, f"it ended before it answered: {log.read_text()[-3000:]}"
            try:
                urllib.request.urlopen(f"{url}/models", timeout=5).read()
                break
            except OSError:
                time.sleep(1)
        yield Server(process, url, log)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory):
    """One for all tests of this module; the last one ends it."""
    with started(checkpoint("qwen3"), tmp_path_factory.mktemp("server") / "log") as made:
        yield made


def complete(server, **asked):
    [model] = server.api.models.list().data
    told = [{"role": "user", "content": "What colour is the door? " * 3}]
    return server.api.chat.completions.create(
        **{"model": model.id, "messages": told, "max_tokens": 16, "temperature": 0, **asked}
    )


def test_what_a_request_may_ask(server):
    whole = complete(server, logprobs=True, top_logprobs=3)
    text = whole.choices[0].message.content
    assert all(len(token.top_logprobs) == 3 for token in whole.choices[0].logprobs.content)
    assert whole.usage.completion_tokens == 16
    stop = next(letter for letter in text if "!" < letter < "~")
    stopped = complete(server, stop=[stop]).choices[0]
    assert stopped.message.content == text[: text.index(stop)] and stopped.finish_reason == "stop"
    drawn = [complete(server, n=3, seed=5, temperature=1).choices for _ in range(2)]
    first, again = ([one.message.content for one in choices] for choices in drawn)
    assert first == again and len(set(first)) > 1
    streamed = complete(server, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in streamed) == text


def test_a_reply_follows_a_json_schema(server):
    schema = {"type": "object", "properties": {"colour": {"enum": COLOURS}}}
    schema |= {"required": ["colour"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "door", "schema": schema}}
    reply = complete(server, response_format=form, max_tokens=64)
    assert json.loads(reply.choices[0].message.content)["colour"] in COLOURS


def test_a_prompt_that_fills_the_context_is_read_and_a_longer_one_is_refused(server):
    [model] = server.api.models.list().data
    ask = {"model": model.id, "max_tokens": 1, "temperature": 0}
    whole = server.api.completions.create(prompt=[5] * (LONGEST - 1), **ask)
    assert whole.usage.prompt_tokens == LONGEST - 1
    with pytest.raises(openai.BadRequestError):
        server.api.completions.create(prompt=[5] * (LONGEST + 1), **ask)
    with pytest.raises(openai.BadRequestError):
        server.api.completions.create(prompt=[9999], **ask)  # no token of this model
    with pytest.raises(openai.NotFoundError):
        complete(server, model="an-adapter")


def test_clients_get_their_own_replies_and_interrupt_ends_it(server):
    import load_test as load

    options = {"url": server.url, "model": None, "clients": 16, "seconds": 10, "words": 40}
    found = load.run(argparse.Namespace(**options, tokens=6, pid=server.process.pid))
    assert found["ok"], found
    assert all(400 <= status < 500 for status in found["malformed"].values())
    assert found["distinct_replies"] > 8, "all replies are alike: a mixed one would not be seen"
    assert found["requests"]["answered"] > 16 and found["requests"]["left"] > 0
    os.killpg(server.process.pid, signal.SIGINT)
    assert server.process.wait(timeout=120) in (0, 130, -signal.SIGINT)
