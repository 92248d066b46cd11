"""`sparsek serve` on vLLM: the OpenAI API, many clients, and how a server ends."""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

openai = pytest.importorskip("openai")
from checkpoints import NEW, tokenizer  # noqa: E402
from servers import LONGEST, complete, free_port, members, started  # noqa: E402  needs openai

from sparsek_cli.serving.transformers_server import PATIENCE  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1]))

COLOURS = ["red", "green"]
LIMIT = 300  # seconds
WHOLE = 5 * PATIENCE  # seconds of a reply, so that one cut short at PATIENCE would show


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory):
    """One for all tests of this module; the last one ends it."""
    with started(checkpoint("qwen3"), tmp_path_factory.mktemp("server") / "log") as made:
        yield made


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


def test_clients_get_their_own_replies_and_a_signal_ends_it(server):
    import load_test as load

    size = argparse.Namespace(clients=16, seconds=10, words=40, tokens=6)
    found = load.under_load(size, server.url, None, server.process.pid)
    assert found["ok"], found
    assert 0 < found["memory"]["least"] <= found["memory"]["most"]
    assert all(400 <= status < 500 for status in found["malformed"].values())
    assert found["distinct_replies"] > 8, "all replies are alike: a mixed one would not be seen"
    assert found["requests"]["answered"] > 16 and found["requests"]["left"] > 0
    server.process.terminate()
    assert server.process.wait(timeout=120) == 0
    assert not members(server)


def tokens_in(server, seconds: float) -> int:
    """Tokens that it writes in this time, by what the machine does just now."""
    tried = 200
    began = time.monotonic()
    complete(server, max_tokens=tried)
    return int(tried * seconds / (time.monotonic() - began))


def heeds_what_is_asked(server, name):
    """Or refuses it with a word; and serves no other model, whose code could be run."""
    drawn = [complete(server, temperature=2, seed=seed, stream=False) for seed in (1, 1, 2)]
    first, again, other = (reply.choices[0].message.content for reply in drawn)
    assert first == again != other
    assert server.api.responses.create(model=name, input="Hello?", max_output_tokens=3).output
    for asked in ({"n": 2}, {"max_tokens": 0}, {"messages": []}, {"model": "an-adapter"}):
        with pytest.raises(openai.BadRequestError, match="(n is|max_tokens|messages|pinned)"):
            complete(server, **asked)
    with pytest.raises(openai.BadRequestError, match="tokens, and the model's context 512"):
        server.api.completions.create(model=name, prompt="a" * 600)
    for path in ("load_model", "reset"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{server.url.removesuffix('/v1')}/{path}", b"{}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_transformers_server_answers_to_the_name_that_is_printed(
    number, checkpoint, expected, tmp_path
):
    """Sparsely, and it ends as asked in the middle of a reply, which SIGTERM leaves whole."""
    folder, prompt = checkpoint("qwen3"), "What colour is the door? " * 4
    [want] = expected(folder, [tokenizer()(prompt).input_ids])
    wanted, dense = (tokenizer().decode(ids) for ids in (want.written, want.dense_written))
    assert wanted != dense
    with started(folder, tmp_path / "log", "transformers") as server:
        said = dict(line.split(maxsplit=1) for line in server.log.read_text().splitlines()[:5])
        assert said["model"] == folder.name and said["url"] == server.url
        assert "one request at a time" in said["limit"]
        assert [model.id for model in server.api.models.list()] == [said["model"]]
        ask = {"model": said["model"], "max_tokens": NEW, "temperature": 0}
        assert server.api.completions.create(prompt=prompt, **ask).choices[0].text == wanted
        heeds_what_is_asked(server, said["model"])
        tokens = 10**6 if number == signal.SIGINT else tokens_in(server, WHOLE)
        asked = server.log.read_text().count("Request received")
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(complete, server, max_tokens=tokens)
            while server.log.read_text().count("Request received") == asked:
                time.sleep(0.1)
            server.process.send_signal(number)
            began = time.monotonic()
            assert server.process.wait(timeout=120) == 0
            if number == signal.SIGINT:
                with pytest.raises(openai.APIError):
                    waiting.result()
            else:
                assert waiting.result().usage.completion_tokens == tokens
                took = time.monotonic() - began
                assert took > PATIENCE + 1, f"{took} s show nothing: raise WHOLE"
        said = server.log.read_text()
        assert "Aborted" not in said and "terminate called" not in said and not members(server)


def test_transformers_server_that_does_not_start_says_why(checkpoint):
    command = [sys.executable, "-m", "sparsek_cli", "serve", str(checkpoint("qwen3"))]
    options = {"capture_output": True, "text": True, "timeout": 120}
    port = free_port()
    flags = ["--engine", "transformers", "--port", str(port), "--json"]
    refused = subprocess.run([*command, *flags, "--", "--attn-implementation", "sdpa"], **options)
    assert json.loads(refused.stdout)["url"].endswith(f":{port}/v1"), "and nothing of the server's"
    assert refused.returncode > 0 and "Traceback" not in refused.stderr
    *_, error, hint = refused.stderr.splitlines()
    assert error.startswith("error: ") and "SparseK" in error and hint.startswith("hint: ")
    loading = subprocess.Popen(
        [*command, *flags], stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL
    )
    assert "starting" in loading.stderr.readline()
    time.sleep(1.5)
    loading.send_signal(signal.SIGINT)
    _, said = loading.communicate(timeout=120)
    assert loading.returncode in (130, 0), said  # 0: it was faster, and served
    assert "Traceback" not in said and "Aborted" not in said
