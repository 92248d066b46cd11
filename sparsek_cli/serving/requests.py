"""What a request to transformers' server may ask: the rest would fail there, or not be heeded.

That server answers a client's mistake with 500 and no word, and takes no notice of what it cannot
do (`n`, `logprobs`, `response_format`), so that the client gets another answer than it asked for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from sparsek_cli.errors import first_line

CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
_LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
_SEEDS = 2**63
_VLLM = "; a server on vLLM does that"


def problem(path: str, body: Any) -> tuple[str, str] | None:
    """(what is wrong with a request, the key at fault), or None.

    Args:
        path: one of `CHAT`, `TEXT` and `RESPONSES`. body: its JSON.
    """
    if not isinstance(body, Mapping):
        return "the body is no JSON object", ""
    if (bad := _no_text(body)) is not None:
        return bad, ""
    checks = _CHECKS | _CHECKS_OF.get(path, {})
    for key, value in body.items():
        check = checks.get(key)
        wrong = check(value) if check is not None and value is not None else None
        if wrong:
            return f"{key} {wrong}", key
    return _content(path, body)


def settled(path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """The body as the server is to read it.

    It knows `max_tokens` alone of the names that chat has for a limit, takes `stop` in text alone
    for one and fails where it lists none, and streams responses unless told otherwise.
    """
    made = dict(body)
    limit = made.pop("max_completion_tokens", None)
    if path == CHAT and limit is not None:
        made["max_tokens"] = limit
    if made.get("stop") == []:
        del made["stop"]
    if path == RESPONSES:
        made.setdefault("stream", False)
    return made


def _no_text(body: Mapping[str, Any]) -> str | None:
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "the body holds half a surrogate pair, which is no text"
    return None


def _content(path: str, body: Mapping[str, Any]) -> tuple[str, str] | None:
    """What is wrong with the text to answer."""
    if path == TEXT:
        prompt = body.get("prompt")
        if not isinstance(prompt, str):
            return "prompt is no text" + ("" if prompt is None else _VLLM), "prompt"
        return None if prompt else ("prompt is empty", "prompt")
    key = "messages" if path == CHAT else "input"
    told = body.get(key)
    if path == RESPONSES and isinstance(told, str):
        return None if told else (f"{key} is empty", key)
    if not isinstance(told, list) or not told:
        return f"{key} is no list of messages", key
    for number, message in enumerate(told):
        if wrong := _message(message, roles=path == CHAT):
            return f"{key}[{number}] {wrong}", key
    return None


def _message(message: Any, *, roles: bool) -> str | None:
    if not isinstance(message, Mapping):
        return "is no object"
    if not isinstance(message.get("role"), str) and roles:
        return "has no role"
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list) or not all(map(_is_call, calls)):
        return "has tool_calls whose arguments are no JSON"
    content = message.get("content")
    if content is None or isinstance(content, str):
        return None
    if not isinstance(content, list):
        return "has a content that is no text"
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in ("text", "input_text", "output_text"):
            return f"holds a part of type {kind!r}, and the model reads text alone"
        if not isinstance(part.get("text"), str):
            return "holds a part of text without a text"
    return None


def _is_call(call: Any) -> bool:
    """Whether transformers' server can read a call of a function, which it undoes the JSON of."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        return False
    arguments = function.get("arguments")
    return not isinstance(arguments, str) or isinstance(_json(arguments), Mapping)


def _json(text: str) -> Any:
    """What it says, or None."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _limit(value: Any) -> str | None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return None if whole and 1 <= value < _SEEDS else "is no whole number from 1 on"


def _seed(value: Any) -> str | None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return None if whole and -_SEEDS <= value < _SEEDS else "is no whole number of 64 bits"


def _between(least: float, most: float) -> Callable[[Any], str | None]:
    def check(value: Any) -> str | None:
        inside = _number(value) and least <= value <= most
        return None if inside else f"is no number from {least:g} to {most:g}"

    return check


def _temperature(value: Any) -> str | None:
    if why := _between(0, 1e6)(value):
        return why
    return "is above 0 and below 1e-6: 0 is greedy" if 0 < value < 1e-6 else None


def _top_p(value: Any) -> str | None:
    return None if _number(value) and 0 < value <= 1 else "is no number above 0, and 1 at most"


def _only(*allowed: Any, elsewhere: str = _VLLM) -> Callable[[Any], str | None]:
    """What this server takes no notice of, but for values that ask for nothing.

    `elsewhere` says which server would.
    """

    def check(value: Any) -> str | None:
        fits = any(value == other and type(value) is type(other) for other in allowed)
        return None if fits else f"is not heeded by this server{elsewhere}"

    return check


def _stop(value: Any) -> str | None:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        return "is no text, and no list of texts"
    return None


def _stream(value: Any) -> str | None:
    return None if isinstance(value, bool) else "is neither true nor false"


def _bias(value: Any) -> str | None:
    fits = isinstance(value, Mapping) and all(
        str(token).isdecimal() and _number(by) for token, by in value.items()
    )
    return None if fits else "is no object of token ids and numbers"


def _text(value: Any) -> str | None:
    return None if isinstance(value, str) else "is no text"


def _tools(value: Any) -> str | None:
    fits = isinstance(value, list) and all(
        isinstance(tool, Mapping) and tool.get("type") == "function" for tool in value
    )
    return None if fits else "is no list of functions"


def _template_words(value: Any) -> str | None:
    """A client's own words for the chat template, which may be none that rendering has itself.

    `chat_template` among them: a template of the client's can run without end.
    """
    if not isinstance(value, Mapping):
        return "is no object"
    taken = [word for word in value if word in _TAKEN]
    return f"may not set {taken[0]}" if taken else None


def _generation(value: Any) -> str | None:
    """transformers' own key: the JSON of a GenerationConfig, in a text."""
    found = _json(value) if isinstance(value, str) else None
    if not isinstance(found, Mapping):
        return "is no text that holds a JSON object"
    refused = [key for key, allowed in _IMPOSSIBLE.items() if found.get(key) not in allowed]
    if refused:
        return f"asks for {refused[0]}, which this server cannot do"
    from transformers import GenerationConfig

    unknown = [key for key in found if not hasattr(GenerationConfig(), key)]
    if unknown:
        return f"has a key that generate does not know: {unknown[0]}"
    try:
        GenerationConfig(**found).validate()
    except Exception as error:  # of whatever kind: it is the client's
        return f"is none that generate takes: {first_line(error)}"
    return None


# Of GenerationConfig: the values that a cache of constant size, and one answer a request, can do.
_IMPOSSIBLE: Mapping[str, tuple[Any, ...]] = {
    "cache_implementation": (None, "dynamic"),
    "prompt_lookup_num_tokens": (None,),
    "num_return_sequences": (None, 1),
    "penalty_alpha": (None,),
    "dola_layers": (None,),
}
# What the server gives apply_chat_template itself, and that gives the template.
_TAKEN = frozenset(
    ("messages", "conversation", "chat_template", "tokenize", "tools", "documents",
     "add_generation_prompt", "continue_final_message", "return_dict", "return_tensors",
     "return_assistant_tokens_mask", "padding", "truncation", "max_length", "tokenizer_kwargs",
     "processor_kwargs")
)  # fmt: skip

_CHECKS: Mapping[str, Callable[[Any], str | None]] = {
    **dict.fromkeys(_LIMITS, _limit),
    "temperature": _temperature,
    "top_p": _top_p,
    "seed": _seed,
    "stop": _stop,
    "stream": _stream,
    "logit_bias": _bias,
    "frequency_penalty": _between(0, 2),
    "presence_penalty": _only(0, 0.0),
    "n": _only(1),
    "best_of": _only(1),
    "logprobs": _only(False),
    "top_logprobs": _only(0),
    "echo": _only(False),
    "response_format": _only({"type": "text"}),
    "text": _only({"format": {"type": "text"}}),
    "tool_choice": _only("auto"),
    "modalities": _only(["text"]),
    "previous_response_id": _only(),
    "background": _only(False),
    "suffix": _only("", elsewhere=""),
    "instructions": _text,
    "tools": _tools,
    "chat_template_kwargs": _template_words,
    "generation_config": _generation,
    **dict.fromkeys(("audio", "functions", "function_call", "web_search_options"), _only()),
}
# Keys that one of them alone does not heed.
_CHECKS_OF: Mapping[str, Mapping[str, Callable[[Any], str | None]]] = {
    TEXT: {"logit_bias": _only({})},
    RESPONSES: {
        "include": _only([], elsewhere=""),
        **dict.fromkeys(("prompt", "conversation"), _only(elsewhere="")),
    },
}
