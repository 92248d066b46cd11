"""What reaches transformers' server, and what is refused before it would fail or not be heeded."""

import asyncio
import json
import sys
import types

import pytest

from sparsek_cli.serving import guard
from sparsek_cli.serving.requests import CHAT, RESPONSES, TEXT


def said(content):
    return [{"role": "user", "content": content}]


MESSAGES = said("Hello?")
GOOD = {
    CHAT: {"model": "m", "messages": MESSAGES},
    TEXT: {"model": "m", "prompt": "It was"},
    RESPONSES: {"model": "m", "input": "Hello?"},
}


class Server:
    """An ASGI application that says yes, and remembers the bodies that it was sent."""

    def __init__(self, replies):
        self.bodies, self.replies = [], replies

    async def __call__(self, scope, receive, send):
        if scope["method"] == "POST":
            message = await receive()
            assert dict(scope["headers"])[b"content-length"] == b"%d" % len(message["body"])
            self.bodies.append(json.loads(message["body"]))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for reply in self.replies:
            await send({"type": "http.response.body", "body": reply})


def ask(path, body=b"", method="POST", kind="application/json", replies=(b"{}",)):
    """(status, what the client reads, what the server was sent)"""
    server, sent = Server(replies), []
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    half = len(content) // 2  # bodies come in pieces
    pieces = [
        {"type": "http.request", "body": content[:half], "more_body": True},
        {"type": "http.request", "body": content[half:]},
    ]

    async def receive():
        return pieces.pop(0) if pieces else {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    headers = [(b"Content-Length", b"%d" % len(content))]
    headers += [(b"Content-Type", kind.encode())] if kind else []
    scope = {"type": "http", "method": method, "path": path, "headers": headers}
    asyncio.run(guard.Guard(server)(scope, receive, send))
    return sent[0]["status"], b"".join(part["body"] for part in sent[1:]), server.bodies


@pytest.mark.parametrize("path", GOOD)
def test_requests_of_every_kind_reach_the_server(path):
    status, _, bodies = ask(path, GOOD[path])
    assert status == 200 and GOOD[path].items() <= bodies[0].items()
    assert bodies[0].get("stream", None if path != RESPONSES else True) in (None, False)


@pytest.mark.parametrize(
    "path", ["/load_model", "/reset", "/v1/audio/transcriptions", "/docs", "/", "/v1/models/"]
)
def test_no_other_model_is_loaded_and_this_one_is_not_dropped(path):
    """`/load_model` fetched whatever a client named, and ran its code."""
    for method in ("POST", "GET"):
        status, read, bodies = ask(path, {"model": "someone/else"}, method)
        assert status == 404 and json.loads(read)["error"]["message"] and not bodies
    assert ask("/v1/models", method="GET")[0] == ask("/health", method="GET")[0] == 200


WRONG = [
    (CHAT, {"messages": None}, "messages is no list"),
    (CHAT, {"messages": []}, "messages is no list"),
    (CHAT, {"messages": "Hello?"}, "messages is no list"),
    (CHAT, {"messages": ["Hello?"]}, r"messages\[0\] is no object"),
    (CHAT, {"messages": [{"content": "Hello?"}]}, r"messages\[0\] has no role"),
    (CHAT, {"messages": MESSAGES + said(5)}, r"messages\[1\] has a"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "reads text alone",
    ),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "without a text"),
    (CHAT, {"messages": said("\ud83d")}, "half a surrogate pair"),
    (CHAT, {"max_tokens": 0}, "max_tokens is no whole number from 1"),
    (CHAT, {"max_tokens": -5}, "max_tokens is no"),
    (CHAT, {"max_tokens": "many"}, "max_tokens is no"),
    (CHAT, {"max_tokens": True}, "max_tokens is no"),
    (CHAT, {"max_completion_tokens": 0}, "max_completion_tokens is no"),
    (RESPONSES, {"max_output_tokens": 1.5}, "max_output_tokens is no"),
    (CHAT, {"temperature": -1}, "temperature is no"),
    (CHAT, {"temperature": float("nan")}, "temperature is no"),
    (CHAT, {"temperature": 1e-300}, "temperature is above 0 and below 1e-6"),
    (CHAT, {"temperature": "hot"}, "temperature is no"),
    (CHAT, {"top_p": 0}, "top_p is no"),
    (CHAT, {"seed": 2**70}, "seed is no"),
    (CHAT, {"stop": ""}, "stop is no"),
    (TEXT, {"suffix": 5}, "suffix is not heeded"),
    (TEXT, {"suffix": "END"}, "suffix is not heeded"),
    (TEXT, {"logit_bias": {"5": 100}}, "logit_bias is not heeded"),
    (RESPONSES, {"instructions": 5}, "instructions is no text"),
    (RESPONSES, {"prompt": {"id": "p"}}, "prompt is not heeded"),
    (RESPONSES, {"conversation": "c"}, "conversation is not heeded by this server$"),
    (RESPONSES, {"include": ["message.output_text.logprobs"]}, "include is not heeded"),
    (RESPONSES, {"tools": [{"type": "web_search"}]}, "tools is no list of functions"),
    (CHAT, {"tools": "x"}, "tools is no list of functions"),
    (CHAT, {"tools": [5]}, "tools is no list of functions"),
    (CHAT, {"chat_template_kwargs": "x"}, "chat_template_kwargs is no object"),
    (CHAT, {"chat_template_kwargs": {"tokenize": False}}, "may not set tokenize"),
    (CHAT, {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "may not set chat_template"),
    (CHAT, {"generation_config": {"top_k": 1}}, "generation_config is no text that holds"),
    (CHAT, {"generation_config": "{"}, "generation_config is no text that holds"),
    (CHAT, {"generation_config": "[1]"}, "generation_config is no text that holds"),
    (TEXT, {"generation_config": '{"cache_implementation": "static"}'}, "asks for cache_impl"),
    (CHAT, {"generation_config": '{"num_return_sequences": 3}'}, "asks for num_return_sequences"),
    (CHAT, {"generation_config": '{"nonsense": 1}'}, "does not know: nonsense"),
    (CHAT, {"generation_config": '{"max_new_tokens": -1}'}, "none that generate takes: .*greater"),
    (
        CHAT,
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}]},
        r"messages\[0\] has tool_calls whose arguments are no JSON",
    ),
    (TEXT, {"stop": ["a", 3]}, "stop is no"),
    (CHAT, {"stream": "yes"}, "stream is neither"),
    (CHAT, {"logit_bias": {"a": 1}}, "logit_bias is no"),
    (CHAT, {"frequency_penalty": -1}, "frequency_penalty is no"),
    (CHAT, {"n": 3}, "n is not heeded .* vLLM"),
    (TEXT, {"best_of": 2}, "best_of is not heeded"),
    (TEXT, {"logprobs": 0}, "logprobs is not heeded"),
    (CHAT, {"logprobs": True}, "logprobs is not heeded"),
    (CHAT, {"response_format": {"type": "json_object"}}, "response_format is not heeded"),
    (CHAT, {"tool_choice": "required"}, "tool_choice is not heeded"),
    (CHAT, {"presence_penalty": 0.5}, "presence_penalty is not heeded"),
    (RESPONSES, {"previous_response_id": "r"}, "previous_response_id is not heeded"),
    (RESPONSES, {"input": ""}, "input is empty"),
    (RESPONSES, {"input": []}, "input is no list"),
    (TEXT, {"prompt": ""}, "prompt is empty"),
    (TEXT, {"prompt": None}, "prompt is no text"),
    (TEXT, {"prompt": [5, 6]}, "prompt is no text; .* vLLM"),
]


@pytest.mark.parametrize(("path", "change", "says"), WRONG)
def test_what_would_fail_or_not_be_heeded_is_refused_by_its_key(path, change, says):
    """These were 500 without a word, or an answer to another question than was asked."""
    status, read, bodies = ask(path, GOOD[path] | change)
    error = json.loads(read)["error"]
    assert status == 400 and not bodies and error["type"] == "invalid_request_error"
    assert pytest.raises(ValueError, match=says).matches(ValueError(error["message"]))
    assert error["param"] in (next(iter(change)), None)


@pytest.mark.parametrize(
    "change",
    [
        {"n": 1, "logprobs": False, "response_format": {"type": "text"}, "user": "me"},
        {"presence_penalty": 0.0, "frequency_penalty": 0, "top_p": 1, "temperature": 0},
        {"max_tokens": None, "stop": None, "tool_choice": "auto", "stream": True},
        {"stop": ["a", "b"], "seed": -1, "logit_bias": {"5": -100}},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": []}]},
        {"messages": said([{"type": "text", "text": "a"}])},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
        {"tools": [], "chat_template_kwargs": {"enable_thinking": False}},
        {"generation_config": '{"max_new_tokens": 4, "top_k": 5, "cache_implementation": null}'},
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}]},
    ],
)
def test_what_asks_for_nothing_unusual_passes(change):
    status, _, bodies = ask(CHAT, GOOD[CHAT] | change)
    assert status == 200 and bodies == [GOOD[CHAT] | change]


def test_no_texts_to_stop_at_are_none():
    """The server failed at an empty list."""
    assert ask(CHAT, GOOD[CHAT] | {"stop": []})[2] == [GOOD[CHAT]]


def test_the_newer_name_of_a_limit_counts():
    """It was not heeded: a reply had up to 1,024 tokens."""
    (body,) = ask(CHAT, GOOD[CHAT] | {"max_completion_tokens": 4})[2]
    assert body == GOOD[CHAT] | {"max_tokens": 4}


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[" * 10**5, b"[1]", b"3"])
def test_bodies_that_are_no_objects(body):
    status, read, bodies = ask(CHAT, body)
    assert status == 400 and "the body is no JSON" in json.loads(read)["error"]["message"]
    assert not bodies


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/plain", ""])
def test_a_body_that_is_not_said_to_be_json(kind):
    """curl's own kind: the server's answer was a validator's, and no error that clients read."""
    status, read, bodies = ask(CHAT, GOOD[CHAT], kind=kind)
    assert status == 415 and "application/json is taken" in json.loads(read)["error"]["message"]
    assert not bodies and ask(CHAT, GOOD[CHAT], kind="Application/JSON; charset=utf-8")[2]


@pytest.mark.parametrize("method, path", [("GET", CHAT), ("PUT", TEXT), ("POST", "/v1/models")])
def test_methods_that_a_path_does_not_take(method, path):
    status, read, bodies = ask(path, GOOD[CHAT], method)
    assert status == 405 and json.loads(read)["error"]["message"].endswith(f", not {method}")
    assert not bodies and ask(path, method="OPTIONS")[0] == 200


def test_a_failure_in_the_middle_of_a_stream_is_json_that_clients_read():
    """The server puts it between quotes as it is: one that has quotes was no JSON."""
    said = b'data: {"choices": "data: {\\"error\\": \\"x\\"}"}\n\n'
    failed = said + b'data: {"error": "no "key"\nhere"}\n\n'
    _, read, _ = ask(CHAT, GOOD[CHAT], replies=(said, failed))
    assert read.startswith(2 * said) and read.endswith(b"\n\n")
    error = json.loads(read.removeprefix(2 * said + b"data: "))["error"]
    assert (error["message"], error["type"]) == ('no "key"\nhere', "server_error")


def test_a_body_without_end_is_not_read_to_its_end(monkeypatch):
    monkeypatch.setattr(guard, "LARGEST", 100)
    assert ask(TEXT, GOOD[TEXT] | {"prompt": "a" * 300})[0] == 413


def test_a_temperature_draws_whatever_the_model_s_own_settings_say():
    class Handler:
        def _build_generation_config(self, body, model_generation_config, use_cb=False):
            return types.SimpleNamespace(do_sample=False)

    guard.draw_where_asked(Handler)
    build = Handler()._build_generation_config
    assert build({"temperature": 0.7}, None).do_sample
    assert not build({"temperature": 0}, None).do_sample and not build({}, None).do_sample
    assert not build({"temperature": 1, "generation_config": "{}"}, None, use_cb=False).do_sample


def test_prompts_longer_than_the_context_are_refused(monkeypatch):
    """They were answered, with nonsense."""

    class HTTPException(Exception):
        def __init__(self, status_code, detail):
            self.status_code = status_code

    monkeypatch.setitem(sys.modules, "fastapi", types.SimpleNamespace(HTTPException=HTTPException))

    class Manager:
        def generate_streaming(self, model, processor, inputs, gen_config, request_id):
            return "said"

        def generate_non_streaming(self, model, processor, inputs, gen_config, request_id):
            return "said"

    guard.refuse_longer_prompts(Manager)
    model = types.SimpleNamespace(config=types.SimpleNamespace(max_position_embeddings=8))

    def told(method, tokens):
        ids = types.SimpleNamespace(shape=(1, tokens))
        return getattr(Manager(), method)(model, None, {"input_ids": ids}, None, request_id="r")

    for method in ("generate_streaming", "generate_non_streaming"):
        assert told(method, 8) == "said"
        for tokens in (9, 0):
            with pytest.raises(HTTPException) as error:
                told(method, tokens)
            assert error.value.status_code == 400


def test_transformers_still_has_what_is_changed():
    from transformers.cli.serving.utils import BaseHandler, GenerateManager

    assert BaseHandler._build_generation_config
    assert GenerateManager.generate_streaming and GenerateManager.generate_non_streaming
