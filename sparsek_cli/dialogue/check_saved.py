"""What a saved conversation says beside its cache: checked before anything of it is taken over."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sparsek_cli.errors import UsageError

if TYPE_CHECKING:
    from sparsek_cli.models import SparseKCache

_MOST_TOKENS = 1 << 31


def _text(value: object) -> bool:
    return isinstance(value, str)


def _texts(value: object, parts: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == parts and all(map(_text, value))


def _messages(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(entry, dict)
        and entry.keys() == {"role", "content"}
        and all(map(_text, entry.values()))
        for entry in value
    )


def _tokens(value: object) -> bool:
    return isinstance(value, list) and all(type(t) is int and 0 <= t < _MOST_TOKENS for t in value)


# Of a session and of its engine, by the names that they have there.
_SESSION: dict[str, Callable[[Any], bool]] = {
    "system": lambda value: value is None or _text(value),
    "messages": _messages,
    "_before": _text,
    "_pending": _text,
    "_opened": lambda value: isinstance(value, bool),
    "_documents": lambda value: isinstance(value, list) and all(_texts(v, 2) for v in value),
    "_full": _messages,
    "_fed_ids": _tokens,
}
_ENGINE: dict[str, Callable[[Any], bool]] = {
    "fed": lambda value: type(value) is int,
    "unfed": _tokens,
    "heard": _tokens,
}


def check_conversation(notes: object, path: str, cache: "SparseKCache", vocabulary: int) -> None:
    """Raises UsageError where a state is none of a conversation.

    Args:
        notes, cache: of the file at `path`. vocabulary: tokens that the model has.
    """
    if not isinstance(notes, dict) or "engine" not in notes or cache.batch_size != 1:
        raise UsageError(f"'{path}' is no conversation", hint="name one that chat has saved")
    engine = notes["engine"]
    session = {key: value for key, value in notes.items() if key != "engine"}
    _check(session, _SESSION, path)
    _check(engine if isinstance(engine, dict) else {}, _ENGINE, path)
    read = cache.get_seq_length()
    if engine["fed"] != read:
        raise _damaged(path, f"it was fed {engine['fed']} tokens, its cache has read {read}")
    if any(token >= vocabulary for name in ("unfed", "heard") for token in engine[name]):
        raise _damaged(path, "it has heard tokens that the model does not have")


def _check(found: dict[str, Any], expected: dict[str, Callable[[Any], bool]], path: str) -> None:
    for key in found.keys() | expected.keys():
        name = str(key).strip("_")[:80]
        if key not in found or key not in expected:
            state = "missing" if key in expected else "no part of one"
            raise _damaged(path, f"of the conversation '{name}' is {state}")
        if not expected[key](found[key]):
            raise _damaged(path, f"of the conversation '{name}' is not what chat writes")


def _damaged(path: str, what: str) -> UsageError:
    return UsageError(f"'{path}' is damaged: {what}", hint="name another file")
