"""A conversation as an append-only stream of text: documents, turns, replies.

Only new tokens are ever fed. A loaded document and the next question stand in one user turn, so
that the document can be read (in chunks, in the constant memory of the cache) before anyone knows
the question.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sparsek_cli.chat.engine import Clock, Engine, Sampling, interruptible
from sparsek_cli.chat.template import TurnPieces, render, template_error, turn_pieces
from sparsek_cli.errors import SparsekError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BLOCK = 1 << 13  # characters read at a time, so that a book costs no more than a page
HELD_BACK = 512  # characters at the end of a document that are tokenized with what follows

# A space before a letter is where every byte-pair tokenizer cuts anyway.
_SAFE_CUT = re.compile(r" (?=[A-Za-z])")


@dataclass
class Stats:
    """The figures of the status line; bytes count one conversation, all layers."""

    context_tokens: int
    kv_bytes: int
    dense_kv_bytes: int
    tokens_per_second: float
    reply_tokens: int


@dataclass
class Session:
    """One conversation with one model.

    Attributes:
        messages: what was said, {"role", "content"}; a document is named, not repeated.
        plain: True when the tokenizer has no chat template: text is simply continued.
    """

    engine: Engine
    tokenizer: "PreTrainedTokenizerBase"
    sampling: Sampling = field(default_factory=Sampling)
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.plain = not getattr(self.tokenizer, "chat_template", None)
        self._encode = Encoder(self.tokenizer)
        self._clock = Clock()
        self._forget()
        if self.system:
            self.set_system(self.system)

    # What a user can do ---------------------------------------------------------------------

    def clear(self) -> None:
        """Starts a new conversation; the system message and the settings stay."""
        self.engine.reset()
        self.messages.clear()
        self._forget()

    def set_system(self, text: str | None) -> None:
        """Starts a new conversation under another system message.

        Raises:
            UsageError: the template has no place for one.
        """
        if text and self.plain:
            raise UsageError(
                "this model has no chat template, so no system message",
                hint="put the instruction into your text",
            )
        if text:
            trial = [{"role": "system", "content": text}, {"role": "user", "content": "x"}]
            reason = template_error(self.tokenizer, trial)
            if reason is not None or text.strip() not in render(self.tokenizer, trial):
                raise UsageError(
                    f"this chat template takes no system message{': ' + reason if reason else ''}",
                    hint="put the instruction into your first question",
                )
        self.system = text or None
        self.clear()

    def load(
        self, text: str, name: str = "", *, on_progress: Callable[[int], None] | None = None
    ) -> bool:
        """Reads a document into the turn that the next question will end.

        Args:
            name: what `/save` calls it.
            on_progress: called with the number of characters read since the last call.

        Returns:
            False when Ctrl-C stopped it; what was read stays.
        """
        text = text.strip("\n")
        if not text.strip():
            raise UsageError(f"the document {name or 'given'} is empty", hint="name another file")
        if self._whole_renders:
            self._documents.append((name or "document", text))
            return True
        self._open_turn()
        if self._documents:
            self._pending += "\n\n"
        self._documents.append((name or "document", ""))  # read now, so not needed again
        with interruptible() as stop:
            for start in range(0, len(text), BLOCK):
                block = text[start : start + BLOCK]
                self._pending += block
                cut = _safe_cut(self._pending, HELD_BACK if start + BLOCK >= len(text) else 0)
                ready, self._pending = self._pending[:cut], self._pending[cut:]
                self._feed_text(ready)
                self._before = ""
                if on_progress is not None:
                    on_progress(len(block))
                if stop.is_set():
                    self._pending = ""
                    return False
        return True

    def ask(self, question: str) -> Iterator[str]:
        """Feeds the question and yields the reply as it comes, piece by piece.

        The reply counts as said even if the caller stops listening.
        """
        if not question.strip() and not self._documents:
            raise UsageError("nothing to answer", hint="write a question")
        named = [f"[{name}]" for name, _ in self._documents]
        said = "\n\n".join([*named, question] if question.strip() else named)
        read = self._feed_whole(question) if self._whole_renders else self._feed_turn(question)
        self._documents.clear()
        self.messages.append({"role": "user", "content": said})
        if not read:
            return
        self._opened = False
        reply = Reply(self.tokenizer)
        self._clock = Clock()
        try:
            for token in self.engine.stream(self.sampling, self._stop_tokens):
                self._clock.tick()
                piece = reply.add(token)
                if piece:
                    yield piece
            rest = reply.rest()
            if rest:
                yield rest
        finally:
            self.messages.append({"role": "assistant", "content": reply.text})
            if self._whole_renders:
                self._full.append({"role": "assistant", "content": reply.text})
                self._fed_ids += reply.ids

    def stats(self) -> Stats:
        """Where the conversation stands now."""
        return Stats(
            context_tokens=self.engine.tokens,
            kv_bytes=self.engine.kv_bytes,
            dense_kv_bytes=self.engine.dense_kv_bytes,
            tokens_per_second=self._clock.rate,
            reply_tokens=self._clock.tokens,
        )

    # How it gets into the cache -------------------------------------------------------------

    def _forget(self) -> None:
        self._before = ""  # the open turn's opening, not fed yet
        self._pending = ""  # the user's text in the open turn, not fed yet
        self._opened = False  # whether the user turn's opening is fed or pending
        self._documents: list[tuple[str, str]] = []  # of the open turn: name, and text if unread
        self._full: list[dict[str, str]] = []  # the conversation with its documents, for renders
        self._fed_ids: list[int] = []  # kept only for templates that cannot be cut
        self._pieces: TurnPieces | None = None
        self._whole_renders = not self.plain and (
            turn_pieces(self.tokenizer, self.system, first=True) is None
            or turn_pieces(self.tokenizer, self.system, first=False) is None
        )
        self._stop_tokens = self._find_stop_tokens()

    def _open_turn(self) -> None:
        if self._opened:
            return
        self._opened = True
        first = not self.engine.fed
        if self.plain:
            self._pieces = TurnPieces("" if first else "\n", "")
        else:
            self._pieces = turn_pieces(self.tokenizer, self.system, first=first)
        self._before = self._pieces.before

    def _feed_turn(self, question: str) -> bool:
        self._open_turn()
        gap = "\n\n" if self._documents and question.strip() else ""
        read = self._feed_text(self._pending + gap + question, self._pieces.after)
        self._before = self._pending = ""
        return read

    def _feed_text(self, text: str, after: str = "") -> bool:
        first = not self.engine.fed
        ids = self._encode(self._before, text, after, first=first, plain=self.plain)
        return not ids or self.engine.feed(ids)

    def _feed_whole(self, question: str) -> bool:
        """For templates that cannot be cut: render all, feed what is new, else start over."""
        content = "\n\n".join([*(text for _, text in self._documents), question])
        self._full.append({"role": "user", "content": content})
        start = [{"role": "system", "content": self.system}] if self.system else []
        try:
            ids = self._encode(render(self.tokenizer, [*start, *self._full]), first=True)
        except Exception as error:
            self._full.pop()
            raise SparsekError(
                f"the chat template failed: {(str(error).splitlines() or [''])[0]}",
                hint="start again with /clear",
            ) from error
        kept = len(self._fed_ids)
        if ids[:kept] != self._fed_ids or kept != self.engine.tokens or kept >= len(ids):
            self.engine.reset()
            kept = 0
        self._fed_ids = ids
        return self.engine.feed(ids[kept:])

    def _find_stop_tokens(self) -> frozenset[int]:
        generation = getattr(self.engine.model, "generation_config", None)
        eos = getattr(generation, "eos_token_id", None)
        stops = set(eos if isinstance(eos, list) else [eos]) | {self.tokenizer.eos_token_id}
        pieces = None if self.plain else turn_pieces(self.tokenizer, self.system, first=False)
        if pieces is not None and pieces.before:
            # What closes a reply in this template (<|im_end|>, <|eot_id|>) ends one, too.
            closing = self._encode(pieces.before, first=False)[:1]
            stops |= set(closing) & set(self.tokenizer.all_special_ids)
        return frozenset(token for token in stops if token is not None)


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


class Reply:
    """Ids to text as they come: never half a character, spaces as the tokenizer means them."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self._tokenizer = tokenizer
        self.ids: list[int] = []
        self._from = self._to = 0  # a window: decoding needs its left neighbours for spacing
        self.text = ""

    def add(self, token: int) -> str:
        """The text that became certain with this token, perhaps none."""
        self.ids.append(token)
        known = self._decode(self.ids[self._from : self._to])
        now = self._decode(self.ids[self._from :])
        if now.endswith("\ufffd") or len(now) <= len(known):
            return ""
        self._from, self._to = self._to, len(self.ids)
        self.text += now[len(known) :]
        return now[len(known) :]

    def rest(self) -> str:
        """What is left at the end, broken characters included."""
        known = self._decode(self.ids[self._from : self._to])
        rest = self._decode(self.ids[self._from :])[len(known) :]
        self.text += rest
        return rest

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def _safe_cut(text: str, hold_back: int) -> int:
    """Where tokenizing may stop: the last safe place before the held-back end, else everything."""
    cut, latest = 0, len(text) - hold_back
    for match in _SAFE_CUT.finditer(text, max(0, latest - BLOCK // 4)):
        if match.start() > latest and cut:
            break
        cut = match.start()
    return cut or len(text)
