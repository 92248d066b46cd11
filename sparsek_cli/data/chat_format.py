"""A tokenizer's chat template as token ids, so that conversations can be built without text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparsek_cli.checkpoint_files.template_steps import MEND, why_failed
from sparsek_cli.data.filler import encode
from sparsek_cli.errors import SparsekError

_MARKS = ("\ue000", "\ue001", "\ue002")


class TemplateFails(SparsekError):
    """A chat template gives no text of a conversation: it refuses it, or is none."""

    def __init__(self, error: Exception):
        super().__init__(f"the chat template failed: {why_failed(error)}", hint=MEND)


def rendered(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> str:
    """A conversation in the chat template.

    Args:
        options: of `apply_chat_template`.

    Raises:
        TemplateFails: no text comes of it.
    """
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # templates refuse with any error of their own
        raise TemplateFails(error) from error


@dataclass(frozen=True)
class ChatFormat:
    """A chat template taken apart, so that conversations can be built from token ids.

    Attributes:
        start: ids before the first user message.
        reply: ids between a user message and the assistant's.
        stop: ids that end the assistant's message; the first one ends generation.
        turn: ids between `stop` and the next user message.
    """

    start: tuple[int, ...]
    reply: tuple[int, ...]
    stop: tuple[int, ...]
    turn: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any) -> ChatFormat:
        """Render the template around markers and cut there.

        Raises:
            ValueError: there is no template, or it cannot be cut. TemplateFails: it fails.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("the tokenizer has no chat template")
        user, assistant, again = _MARKS

        def render(*contents: str) -> str:
            roles = ("user", "assistant", "user")
            messages = [
                {"role": role, "content": content}
                for role, content in zip(roles, contents, strict=False)
            ]
            return rendered(tokenizer, messages, add_generation_prompt=len(contents) != 2)

        start, rest = render(user, assistant, again).split(user)
        reply, rest = rest.split(assistant)
        between, _ = rest.split(again)
        stop = render(user, assistant).split(assistant)[1]
        if not between.startswith(stop):
            raise ValueError("the chat template ends the last reply differently from the others")
        rows = encode(tokenizer, [start, reply, stop, between[len(stop) :]])
        return cls(*(tuple(row) for row in rows))
