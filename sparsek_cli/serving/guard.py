"""In front of transformers' server: what it is asked, and what may be asked of it.

Left alone it loads whatever model a client names (`/load_model`), and drops the one it serves
(`/reset`). Requests are looked at first (`requests.py`); those that pass reach it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from functools import wraps
from typing import Any

from sparsek_cli.errors import first_line
from sparsek_cli.families.positions import context_length
from sparsek_cli.serving.requests import CHAT, RESPONSES, TEXT, problem, settled

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_ASKED = (CHAT, TEXT, RESPONSES)
_OPEN = (*_ASKED, "/v1/models", "/health")
LARGEST = 64 << 20  # bytes of a request
# How the server tells a stream of a failure: the message stands in quotes, its own as they are.
_FAILURE = re.compile(rb'^data: \{"error": "(.*)"\}\n\n\Z', re.DOTALL | re.MULTILINE)


class Guard:
    """An ASGI application around another.

    Args:
        app: transformers' server.
    """

    def __init__(self, app: Any):
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        if path not in _OPEN:
            await _refuse(send, 404, f"there is no {path}", "")
            return
        takes = ("POST",) if path in _ASKED else ("GET", "HEAD")
        if scope["method"] not in (*takes, "OPTIONS"):  # by which browsers ask what they may do
            await _refuse(send, 405, f"{path} takes {takes[0]}, not {scope['method']}", "")
            return
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        if not (kind := _kind(scope)).endswith(("/json", "+json")):
            wrong = f"content-type is {kind or 'not given'}, and application/json is taken"
            await _refuse(send, 415, wrong, "")
            return
        content = await _content(receive)
        if content is None:
            return
        if len(content) > LARGEST:
            await _refuse(send, 413, f"the body has more than {LARGEST >> 20} MiB", "")
            return
        try:
            body = json.loads(content)
        except (ValueError, RecursionError) as error:
            await _refuse(send, 400, f"the body is no JSON: {first_line(error)}", "")
            return
        wrong = problem(path, body)
        if wrong is not None:
            await _refuse(send, 400, *wrong)
            return
        given = _with(scope, receive, json.dumps(settled(path, body)).encode())
        await self._app(*given, _readable(send))


def _kind(scope: Message) -> str:
    """What the request says that its body is; "" where it says nothing."""
    named = (value for name, value in scope["headers"] if name.lower() == b"content-type")
    return next(named, b"").decode("latin-1").partition(";")[0].strip().lower()


def _readable(send: Send) -> Send:
    """`send`, with failures in the middle of a stream as clients of the OpenAI API read them."""

    async def told(message: Message) -> None:
        body = message.get("body", b"")
        if message["type"] == "http.response.body" and (found := _FAILURE.search(body)):
            failure = error_body(found[1].decode(errors="replace"), ours=True)
            body = body[: found.start()] + b"data: " + json.dumps(failure).encode() + b"\n\n"
            message = {**message, "body": body}
        await send(message)

    return told


async def _content(receive: Receive) -> bytes | None:
    """The whole body, or somewhat more than `LARGEST` of it; None where the client has left."""
    found = bytearray()
    while len(found) <= LARGEST:
        message = await receive()
        if message["type"] != "http.request":
            return None
        found += message.get("body", b"")
        if not message.get("more_body"):
            break
    return bytes(found)


def _with(scope: Message, receive: Receive, content: bytes) -> tuple[Message, Receive]:
    """The request with another body."""
    length = b"content-length"
    headers = [pair for pair in scope["headers"] if pair[0].lower() != length]
    bodies = [{"type": "http.request", "body": content, "more_body": False}]

    async def again() -> Message:
        return bodies.pop() if bodies else await receive()

    return {**scope, "headers": [*headers, (length, str(len(content)).encode())]}, again


def error_body(message: str, key: str = "", *, ours: bool = False) -> dict[str, Any]:
    """An error as clients of the OpenAI API read it; `ours`: of the server's own."""
    kind = "server_error" if ours else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": key or None, "code": None}}


async def _refuse(send: Send, status: int, message: str, key: str) -> None:
    content = json.dumps(error_body(message, key)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(content))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


def guarded(app: Any) -> Guard:
    """transformers' FastAPI application behind a guard; its errors are such as clients read."""
    from fastapi import HTTPException
    from fastapi.responses import JSONResponse
    from jinja2 import TemplateError

    async def refused(_request: Any, error: HTTPException) -> JSONResponse:
        return JSONResponse(error_body(str(error.detail)), status_code=error.status_code)

    async def unfit(_request: Any, error: Exception) -> JSONResponse:
        said = f"the chat template refuses these messages: {first_line(error)}"
        return JSONResponse(error_body(said, "messages"), status_code=400)

    async def failed(_request: Any, error: Exception) -> JSONResponse:
        said = f"{type(error).__name__}: {first_line(error)}"
        return JSONResponse(error_body(said, ours=True), status_code=500)

    app.add_exception_handler(HTTPException, refused)
    app.add_exception_handler(TemplateError, unfit)
    app.add_exception_handler(Exception, failed)
    return Guard(app)


def draw_where_asked(handler: type) -> None:
    """A temperature draws, whatever the model's generation_config.json says about drawing.

    Args:
        handler: transformers' `BaseHandler`.
    """
    build = handler._build_generation_config

    @wraps(build)
    def drawing(self, body: dict, *rest: Any, **named: Any) -> Any:
        config = build(self, body, *rest, **named)
        if body.get("temperature") and body.get("generation_config") is None:
            config.do_sample = True
        return config

    handler._build_generation_config = drawing


def leave_prompts_open(manager: type) -> None:
    """A prompt that is to be completed is not closed first, whatever its tokenizer puts behind it.

    Args:
        manager: transformers' `ModelManager`.
    """
    from sparsek_cli.loading import leave_open

    load = manager._load_processor

    @wraps(load)
    def opened(self, model_id_and_revision: str, *rest: Any, **named: Any) -> Any:
        processor = load(self, model_id_and_revision, *rest, **named)
        leave_open(getattr(processor, "tokenizer", processor), model_id_and_revision.split("@")[0])
        return processor

    manager._load_processor = opened


def refuse_longer_prompts(manager: type) -> None:
    """What is longer than the model's context is refused; the answer would be nonsense.

    Args:
        manager: transformers' `GenerateManager`.
    """

    def looking_first(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def checked(self, model: Any, processor: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
            _check_length(model.config, inputs["input_ids"].shape[-1])
            return method(self, model, processor, inputs, *rest, **named)

        return checked

    for name in ("generate_streaming", "generate_non_streaming"):
        setattr(manager, name, looking_first(getattr(manager, name)))


def _check_length(config: Any, tokens: int) -> None:
    """Raises fastapi's HTTPException, of status 400."""
    from fastapi import HTTPException

    own = getattr(config, "max_position_embeddings", None)
    context = own and context_length(own, getattr(config, "rope_parameters", None))
    if context and tokens > context:
        raise HTTPException(
            status_code=400,
            detail=f"the prompt has {tokens:,} tokens, and the model's context {context:,}",
        )
    if not tokens:
        raise HTTPException(status_code=400, detail="the prompt has no tokens")
