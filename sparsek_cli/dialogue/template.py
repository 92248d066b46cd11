"""What a chat template writes around a turn, cut out once, so that turns can be appended.

A template renders whole conversations. Rendering one with marked messages and cutting it at the
marks gives the pieces around a user turn; the cache then only ever receives the new piece, and
what the model said stays in it word for word, whatever the template would make of it later.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsek_cli.errors import UsageError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REPLY, _USER = "sparsek-reply-mark-7f3a", "sparsek-user-mark-5c1e"


@dataclass(frozen=True)
class TurnPieces:
    """Text before and after the user's words.

    Attributes:
        before: closes the previous reply (if there is one) and opens the user turn.
        after: closes the user turn and opens the reply.
    """

    before: str
    after: str


def turn_pieces(
    tokenizer: "PreTrainedTokenizerBase", system: str | None, *, first: bool
) -> TurnPieces | None:
    """The pieces around the next user turn, or None when this template cannot be cut.

    Args:
        system: the system message, part of `before` in the first turn.
        first: whether nothing was said yet.
    """
    start = [{"role": "system", "content": system}] if system else []
    earlier = [{"role": "user", "content": "x"}, {"role": "assistant", "content": _REPLY}]
    messages = [*start, *([] if first else earlier), {"role": "user", "content": _USER}]
    try:
        text = render(tokenizer, messages)
    except Exception:
        # A template may refuse with any error of its own; the caller renders whole conversations.
        return None
    if text.count(_USER) != 1 or (not first and text.count(_REPLY) != 1):
        return None
    before, after = text.split(_USER)
    if not first:
        if _REPLY not in before:
            return None
        before = before.split(_REPLY)[1]
    return TurnPieces(before, after)


def render(tokenizer: "PreTrainedTokenizerBase", messages: list[dict[str, str]]) -> str:
    """The conversation as text, ending where the reply begins."""
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def check_system(tokenizer: "PreTrainedTokenizerBase", text: str) -> None:
    """Raises UsageError where a template has no place for this system message."""
    trial = [{"role": "system", "content": text}, {"role": "user", "content": "x"}]
    why = ""
    try:
        if text.strip() in render(tokenizer, trial):
            return
    except Exception as error:  # templates refuse with any error of their own
        why = f": {first_line(error)}"
    raise UsageError(
        f"this chat template takes no system message{why}",
        hint="put the instruction into your first question",
    )


def stop_tokens(
    model: Any, tokenizer: "PreTrainedTokenizerBase", closing: Iterable[int]
) -> frozenset[int]:
    """What ends a reply: the model's and the tokenizer's own, and special tokens of `closing`."""
    eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    stops = set(eos if isinstance(eos, list) else [eos]) | {tokenizer.eos_token_id}
    stops |= set(closing) & set(tokenizer.all_special_ids)
    return frozenset(token for token in stops if token is not None)
