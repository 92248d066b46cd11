"""Between text and tokens: a piece at a time, as if all had been tokenized together; which ids."""

import json
import logging
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOG = logging.getLogger("sparsek_cli")
BLOCK = 1 << 13  # characters read at a time, so that a book costs no more than a page

# A space before a letter is where every byte-pair tokenizer cuts anyway.
_SAFE_CUT = re.compile(r" (?=[A-Za-z])")


class Encoder:
    """Text to ids, piece by piece as if the pieces had been tokenized together."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self._tokenizer = tokenizer
        self._marks = [t for t in tokenizer.all_special_tokens if t]
        self._lead = self._ids("\n")
        # SentencePiece puts a space before every text it is given, mid-stream pieces included.
        both = self._ids("\na")
        cut = len(self._lead)
        self._adds_space = both[:cut] == self._lead and both[cut:] != self._ids("a")
        with_special = tokenizer("a").input_ids
        self._start = with_special[:1] if with_special[:1] == [tokenizer.bos_token_id] else []

    def __call__(
        self, before: str, text: str = "", after: str = "", *, first: bool, plain: bool = False
    ) -> list[int]:
        """Ids of the three texts as one.

        Args:
            before, after: the template's, where special tokens are meant.
            text: the user's, where "</s>" is four characters that end nothing.
            first: nothing stands before it.
            plain: no template wrote it, so a first piece gets the tokenizer's own start.
        """
        start = self._start if plain and first else []
        if not any(mark in text for mark in self._marks):
            return [*start, *self._piece(before + text + after, first)]
        ids = self._piece(before, first)
        ids += self._piece(text, first and not ids, split_special_tokens=True)
        return [*start, *ids, *self._piece(after, False)]

    def _piece(self, text: str, first: bool, **options: bool) -> list[int]:
        if not text:
            return []
        if self._adds_space and not first:
            ids = self._ids("\n" + text, **options)
            if ids[: len(self._lead)] == self._lead:
                return ids[len(self._lead) :]
        return self._ids(text, **options)

    def _ids(self, text: str, **options: bool) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, verbose=False, **options).input_ids


class Known:
    """The ids that a tokenizer has a token for: embeddings mostly have some rows more.

    Nobody trained those, and a model may say one all the same. Most tokenizers give no text for
    it, and some none for the tokens around it: ByT5's fails.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self._tokenizer, self._count = tokenizer, len(tokenizer)
        self._all: frozenset[int] | None = None

    def __contains__(self, token: int) -> bool:
        if token < self._count:
            return True
        if self._all is None:  # ids may have gaps
            self._all = frozenset(self._tokenizer.get_vocab().values())
        return token in self._all


def text_of(tokenizer: "PreTrainedTokenizerBase", ids: Iterable[int], **options: bool) -> str:
    """The text of ids that may be a model's: those that the tokenizer does not know have none."""
    known = Known(tokenizer)
    return tokenizer.decode([token for token in ids if token in known], **options)


class Reply:
    """Ids to text as they come: never half a character, spaces as the tokenizer means them."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self._tokenizer, self._known = tokenizer, Known(tokenizer)
        self.ids: list[int] = []
        self._shown: list[int] = []  # those that have a text
        self._from = self._to = 0  # a window: decoding needs its left neighbours for spacing
        self.text = ""

    def add(self, token: int) -> str:
        """The text that became certain with this token, perhaps none."""
        self.ids.append(token)
        if token not in self._known:
            return ""
        self._shown.append(token)
        known = self._decode(self._shown[self._from : self._to])
        now = self._decode(self._shown[self._from :])
        if now.endswith("\ufffd") or len(now) <= len(known):
            return ""
        self._from, self._to = self._to, len(self._shown)
        self.text += now[len(known) :]
        return now[len(known) :]

    def rest(self) -> str:
        """What is left at the end, broken characters included."""
        known = self._decode(self._shown[self._from : self._to])
        rest = self._decode(self._shown[self._from :])[len(known) :]
        self.text += rest
        return rest

    def pieces(self, tokens: Iterable[int]) -> Iterator[str]:
        """Everything that there is to show of these tokens, as soon as it is certain."""
        for token in tokens:
            piece = self.add(token)
            if piece:
                yield piece
        rest = self.rest()
        if rest:
            yield rest
        unknown = len(self.ids) - len(self._shown)
        if unknown:
            first = next(token for token in self.ids if token not in self._known)
            _LOG.warning(
                "the tokenizer knows nothing of %d of the %d tokens that the model wrote (the "
                "first is %d): they have no text, and are left out",
                unknown, len(self.ids), first,
            )  # fmt: skip

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def pieces_of(text: str) -> Iterator[str]:
    """A text, `BLOCK` characters at a time."""
    return (text[start : start + BLOCK] for start in range(0, len(text), BLOCK))


def stripped(parts: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Parts of a text without the newlines around all of it, each with whether it is the last."""
    held, newlines = "", ""
    for part in parts:
        whole = newlines + part if held else part.lstrip("\n")
        body = whole.rstrip("\n")
        if not body:
            newlines = whole
            continue
        if held:
            yield held, False
        held, newlines = body, whole[len(body) :]
    if held:
        yield held, True


def safe_cut(text: str, hold_back: int) -> int:
    """Where tokenizing may stop: the last safe place before the held-back end, else everything."""
    cut, latest = 0, len(text) - hold_back
    for match in _SAFE_CUT.finditer(text, max(0, latest - BLOCK // 4)):
        if match.start() > latest and cut:
            break
        cut = match.start()
    return cut or len(text)


def ids_of(tokenizer: Any) -> int:
    """One more than its largest id: ids may have gaps, which `len` does not count."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))


def told(tokenizer: Any) -> str:
    """All that a tokenizer makes ids by, as text: not its words alone, which others have, too."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab())
