"""Killed clients, engines and servers: others get answers, or an error, and nothing stays."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

openai = pytest.importorskip("openai")
from servers import complete, launched, members, started  # noqa: E402  needs openai

pytestmark = pytest.mark.slow

LIMIT = 300  # seconds; by hand 15 were enough, on two idle cores
LONG = 400  # tokens, which take a while
TRIES = 5
STREAM = """
import sys, openai
api = openai.OpenAI(base_url=sys.argv[1], api_key="none", timeout=120, max_retries=0)
ask = {"model": sys.argv[2], "max_tokens": int(sys.argv[3]), "temperature": 0, "stream": True}
for _ in range(int(sys.argv[4])):
    for piece in api.completions.create(prompt=[7] * 20, extra_body={"ignore_eos": True}, **ask):
        print("piece", flush=True)
"""


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory):
    """One for both tests; the last one ends it."""
    with started(checkpoint("qwen3"), tmp_path_factory.mktemp("killed") / "log") as made:
        yield made


def streaming(server, streams: int = 1) -> subprocess.Popen:
    """A client of its own process, in the middle of the first of its streams."""
    [model] = server.api.models.list().data
    command = [sys.executable, "-c", STREAM, server.url, model.id, str(LONG), str(streams)]
    client = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert client.stdout.readline() == "piece\n"
    return client


def soon(holds: Callable[[], bool]) -> bool:
    end = time.monotonic() + LIMIT
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.5)
    return True


def metric(server, name: str) -> float:
    """The sum of what the server counts under a name, whatever the labels."""
    page = urllib.request.urlopen(server.url.removesuffix("/v1") + "/metrics", timeout=30)
    lines = page.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def test_a_killed_client_s_request_is_given_up(server):
    alone = complete(server).choices[0].message.content
    for _ in range(TRIES):  # a fast engine may come to the end before the client is dead
        before = metric(server, "vllm:generation_tokens_total")
        client = streaming(server)
        client.kill()
        client.communicate()
        assert soon(lambda: metric(server, "vllm:num_requests_running") == 0)
        written = metric(server, "vllm:generation_tokens_total") - before
        assert written > 0
        if written < LONG:
            break
    assert written < LONG, "it was written to its end, for nobody"
    assert complete(server).choices[0].message.content == alone


def test_a_killed_engine_ends_the_server_and_all_clients_hear_of_it(server):
    [engine] = [pid for pid, name in members(server).items() if "Engine" in name]
    client = streaming(server, streams=10**6)  # one may end before the engine is stopped
    # Stopped first: however fast it is, the request that waits cannot come to its end.
    subprocess.run(["kill", "-STOP", str(engine)], check=True)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(complete, server, max_tokens=LONG)
        subprocess.run(["kill", "-9", str(engine)], check=True)
        with pytest.raises(openai.APIError):
            waiting.result(timeout=LIMIT)
    _, words = client.communicate(timeout=LIMIT)
    assert client.returncode == 1 and "openai." in words.splitlines()[-1], words
    assert server.process.wait(timeout=LIMIT) == 1, "vLLM's own exit code is 0"
    said = server.log.read_text()
    assert "error: vLLM's engine died" in said and "hint: " in said
    assert soon(lambda: not members(server)), f"still there: {members(server)}"
    with pytest.raises(openai.APIConnectionError):
        server.api.models.list()


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_server_that_is_ended_while_it_loads_leaves_nothing(number, code, checkpoint, tmp_path):
    with launched(checkpoint("qwen3"), tmp_path / "log") as server:
        engine = lambda: any("Engine" in name for name in members(server).values())  # noqa: E731
        assert soon(engine), server.log.read_text()
        server.process.send_signal(number)
        assert server.process.wait(timeout=LIMIT) == code
        assert soon(lambda: not members(server)), f"still there: {members(server)}"
        if code > 0:
            assert "error: interrupted before it served" in server.log.read_text()
