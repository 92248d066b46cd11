"""A tokenizer's chat template as token ids, so that conversations can be built without text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparsek_cli.data.filler import encode

_MARKS = ("\ue000", "\ue001", "\ue002")


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
        """Render the template around markers and cut there; ValueError without a template."""
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("the tokenizer has no chat template")
        user, assistant, again = _MARKS

        def render(*contents: str) -> str:
            roles = ("user", "assistant", "user")
            messages = [
                {"role": role, "content": content}
                for role, content in zip(roles, contents, strict=False)
            ]
            return tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=len(contents) != 2
            )

        start, rest = render(user, assistant, again).split(user)
        reply, rest = rest.split(assistant)
        between, _ = rest.split(again)
        stop = render(user, assistant).split(assistant)[1]
        if not between.startswith(stop):
            raise ValueError("the chat template ends the last reply differently from the others")
        rows = encode(tokenizer, [start, reply, stop, between[len(stop) :]])
        return cls(*(tuple(row) for row in rows))
