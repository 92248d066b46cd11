"""The text of a row of a table, and what is refused in its place."""

import shlex
from itertools import islice

from sparsek_cli.errors import UsageError

MOST_NAMES = 12  # of columns, in a message
# What columns of conversations are called.
CHATS = ("messages", "conversations", "conversation", "dialogue")


def text_of(row: dict, column: str | None, where: str) -> str:
    wanted = column or "text"
    chat = [name for name in ([wanted] if wanted in row else CHATS) if _is_chat(row, name)]
    if chat:
        raise UsageError(
            f"{where}: column '{chat[0]}' holds conversations, and only text is read",
            hint="write each as text into a column 'text' first: tokenizer.apply_chat_template("
            "[{'role': 'user', 'content': ...}, ...], tokenize=False)",
        )
    if wanted not in row:
        names = [str(name) for name in islice(row, MOST_NAMES)]
        names += ["..."] * (len(row) > MOST_NAMES)
        raise UsageError(
            f"{where}: no column '{wanted}'; it has: {', '.join(names)}",
            hint=_another(row),
        )
    text = row[wanted]
    if text is None:
        return ""  # left out, as a blank one is
    if not isinstance(text, str):
        raise UsageError(
            f"{where}: column '{wanted}' holds {type(text).__name__}, not text",
            hint=_another(row),
        )
    return whole(text, where)


def _another(row: dict) -> str:
    """What to do about it: finetune alone has a setting. The longest text is what was meant."""
    texts = {name: len(value) for name, value in row.items() if isinstance(value, str)}
    likely = max(texts, key=texts.__getitem__, default="NAME")
    return (
        f"finetune takes another (data.text.column={shlex.quote(str(likely))}, or 'column' of its "
        "source in a recipe); other verbs read a column 'text': write it into a file with one"
    )


def whole(text: str, where: str) -> str:
    """The text.

    Raises:
        UsageError: JSON gave half of a surrogate pair, which no tokenizer takes.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{where}: the text is not valid Unicode: half a surrogate pair at character "
            f"{error.start}",
            hint="leave it out, or replace it (U+FFFD)",
        ) from error
    return text


def _is_chat(row: dict, name: str) -> bool:
    """Whether a column holds lists of messages, or is called so and its values are not known."""
    value = row.get(name)
    turns = value if isinstance(value, list) else ()
    named = name in row and name in CHATS and all(v is None for v in row.values())
    return named or any(isinstance(turn, dict) for turn in turns)
