"""Chat templates are programs of strangers: one that does not end is found before it is used.

So is one that never begins, as with a mistake in its syntax: that is said, since texts need none.
"""

from __future__ import annotations

import logging
import sys
from functools import cache
from types import FrameType
from typing import TYPE_CHECKING, Any

from sparsek_cli.errors import SparsekError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOG = logging.getLogger("sparsek_cli")
MEND = "mend or remove it: chat_template.jinja, or chat_template in tokenizer_config.json"
# Steps of a template for a conversation of three short turns; the longest in use take hundreds.
MOST_STEPS = 50_000
MOST_CHARACTERS = 10_000_000  # of one of its variables: text that doubles fills any memory
# What jinja2 calls the code that it makes of a template, and its one function that loops at will.
_CODE, _LOREM_IPSUM = "<template>", "generate_lorem_ipsum"
_SIZED = (str, list, tuple)
_SYSTEM = {"role": "system", "content": "s"}
_TURNS = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
]
_TRIALS = (_TURNS[:1], _TURNS, [_SYSTEM, *_TURNS])


class _TooMuch(BaseException):
    """No Exception, which a template's own functions might catch."""


def check_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Renders short conversations and counts the template's steps.

    A template may refuse any of them: whoever renders a conversation is told then. One that fails
    at all of them is named in a warning.

    Args:
        name: what to call the model.

    Raises:
        SparsekError: the template takes more steps or room than any in use, or raises to a power.
    """
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return
    texts = template.values() if isinstance(template, dict) else [template]
    if any(_has_power(text) for text in texts if isinstance(text, str)):
        raise _refusal(name, "raises numbers to powers")
    failures = []
    for messages in _TRIALS:
        before = sys.gettrace()
        sys.settrace(_counting())
        try:
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except _TooMuch as found:
            raise _refusal(name, f"takes over {found} for three turns") from None
        except Exception as error:
            failures.append(error)
        finally:
            sys.settrace(before)
    if len(failures) == len(_TRIALS):
        _warn(name.rpartition("/")[2], why_failed(failures[0]))  # a verb may say its path, too


def why_failed(error: Exception) -> str:
    """What a template's engine says, and of a mistake in its syntax where it is."""
    line = getattr(error, "lineno", None)
    return first_line(error) + (f" (line {line})" if line else "")


@cache
def _warn(name: str, why: str) -> None:
    """Once: a verb may look at a tokenizer more than once."""
    _LOG.warning(
        "the chat template of '%s' fails whatever is said: %s; chat will fail, too: %s",
        name, why, MEND,
    )  # fmt: skip


def _counting() -> Any:
    """A trace function that raises `_TooMuch` where lines of templates or their texts are many."""
    from jinja2.utils import Namespace

    steps = 0

    def step(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps > MOST_STEPS:
            raise _TooMuch(f"{MOST_STEPS:,} steps")
        for value in frame.f_locals.values():
            if _size(value, Namespace) > MOST_CHARACTERS:
                raise _TooMuch(f"{MOST_CHARACTERS:,} characters")
        return step

    def enter(frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        counted = code.co_filename == _CODE or code.co_name == _LOREM_IPSUM
        return step(frame, event, argument) if counted else None

    return enter


def _size(value: Any, namespace: type) -> int:
    """Characters of a text, items of a list; of a namespace, those of its largest."""
    if isinstance(value, _SIZED):
        return len(value)
    if isinstance(value, namespace):
        inner = value._Namespace__attrs.values()
        return max((_size(one, namespace) for one in inner), default=0)
    return 0


def _has_power(template: str) -> bool:
    """Whether an expression has the operator **, which jinja2 works out while it compiles."""
    import jinja2

    try:
        tokens = list(jinja2.Environment().lex(template))
    except jinja2.TemplateError:
        return False  # whoever renders it is told
    last = ""
    for _, kind, value in tokens:
        if kind == "operator" and value == "**" and last not in ("(", ","):
            return True  # elsewhere it hands keywords on
        last = last if kind == "whitespace" else value
    return False


def _refusal(name: str, why: str) -> SparsekError:
    return SparsekError(f"the chat template of '{name}' {why}", hint=MEND)
