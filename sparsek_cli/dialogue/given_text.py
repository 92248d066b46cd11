"""What is given to a conversation: text, and valid Unicode."""

from collections.abc import Iterable, Iterator

from sparsek_cli.errors import UsageError


def checked_parts(text: object, name: str) -> Iterator[str]:
    """A document's parts as they come, each of them text."""
    if isinstance(text, str | bytes) or not isinstance(text, Iterable):
        text = [text]
    for part in text:
        check_text(part, f"the document {name}")
        yield part


def check_text(text: object, what: str) -> None:
    """Bytes of another encoding arrive as halves of surrogate pairs, which no tokenizer takes."""
    if not isinstance(text, str):
        raise UsageError(f"{what} should be text, not {text!r:.60}", hint='give it as "..."')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{what} is not valid UTF-8 (character {error.start})",
            hint="pipe it in: iconv -f latin1 -t utf-8 FILE | sparsek chat MODEL",
        ) from error
