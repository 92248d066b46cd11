"""A conversation as an append-only stream of text: documents, turns, replies.

Only new tokens are ever fed. A loaded document and the next question stand in one user turn, so
that the document can be read (in chunks, in the constant memory of the cache) before anyone knows
the question.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsek_cli.data.pieces import Encoder, Reply, pieces_of, safe_cut, stripped
from sparsek_cli.dialogue.engine import Engine, Snapshot
from sparsek_cli.dialogue.figures import Clock, Stats
from sparsek_cli.dialogue.given_text import check_text, checked_parts
from sparsek_cli.dialogue.interrupt import interruptible
from sparsek_cli.dialogue.sampling import Sampling
from sparsek_cli.dialogue.template import TurnPieces, check_system, render, stop_tokens, turn_pieces
from sparsek_cli.errors import SparsekError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HELD_BACK = 512  # characters at the end of a document that are tokenized with what follows
MOMENTS = 8  # questions that /undo can take back; each keeps a copy of the cache
# What a conversation is beside the engine's cache.
_STANDING = (
    "system", "messages", "_before", "_pending", "_opened", "_documents", "_full", "_fed_ids",
)  # fmt: skip


@dataclass
class Moment:
    """Where a conversation stood, to go back to.

    Attributes:
        engine: what `Engine.snapshot` gave. standing: the session's own fields, copied.
        question: what was asked next; None for a fork.
    """

    engine: Snapshot
    standing: dict[str, Any]
    question: str | None = None


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
        self._moments: list[Moment] = []
        self.forks: dict[str, Moment] = {}
        self.states: set[Path] = set()  # files of states, written here or gone on from
        self._forget()
        if self.system:
            self.set_system(self.system)

    # What a user can do ---------------------------------------------------------------------

    def clear(self) -> None:
        """Starts a new conversation; the system message and the settings stay."""
        self.engine.reset()
        self.messages.clear()
        self._moments.clear()
        self._forget()

    def set_system(self, text: str | None) -> None:
        """Starts a new conversation under another system message.

        Raises:
            UsageError: the template has no place for one, or it is not valid Unicode.
        """
        check_text("" if text is None else text, "the system message")
        if text and self.plain:
            raise UsageError(
                "this model has no chat template, so no system message",
                hint="put the instruction into your text",
            )
        if text:
            check_system(self.tokenizer, text)
        self.system = text or None
        self.clear()

    def load(
        self,
        text: str | Iterable[str],
        name: str = "",
        *,
        on_progress: Callable[[int], None] | None = None,
    ) -> bool:
        """Reads a document into the turn that the next question will end.

        Args:
            text: all of it, or its parts one after the other, which are then not kept.
            name: what `/save` calls it.
            on_progress: called with the number of characters read since the last call.

        Returns:
            False when Ctrl-C stopped it; what was read stays.

        Raises:
            UsageError: it is empty, no text, or not valid Unicode.
        """
        name = name or "document"
        if isinstance(text, str):
            text = pieces_of(text if text.strip() else "")
        parts = stripped(checked_parts(text, name))
        first = next(parts, None)
        if first is None:
            raise UsageError(f"the document {name} is empty", hint="name another file")
        if self._whole_renders:
            self._documents.append((name, "".join(part for part, _ in chain([first], parts))))
            return True
        self._open_turn()
        if self._documents:
            self._pending += "\n\n"
        self._documents.append((name, ""))  # read now, so not needed again
        with interruptible() as stop:
            for block, last in chain([first], parts):
                self._pending += block
                cut = safe_cut(self._pending, HELD_BACK if last else 0)
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

        Raises:
            UsageError: there is nothing to answer, or it is not valid Unicode.
        """
        check_text(question, "the question")
        if not question.strip() and not self._documents:
            raise UsageError("nothing to answer", hint="write a question")
        self._moments = [*self._moments[1 - MOMENTS :], self.moment(question)]
        self._clock = Clock()
        named = [f"[{name}]" for name, _ in self._documents]
        said = "\n\n".join([*named, question] if question.strip() else named)
        read = self._feed_whole(question) if self._whole_renders else self._feed_turn(question)
        self._documents.clear()
        self.messages.append({"role": "user", "content": said})
        if not read:
            return
        self._opened = False
        reply = Reply(self.tokenizer)
        self.reply_start = len(self.engine.heard)
        try:
            tokens = self.engine.stream(self.sampling, self.stop_tokens)
            yield from reply.pieces(self._clock.timed(tokens))
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
            first_token_seconds=self._clock.first,
        )

    # Going back ---------------------------------------------------------------------------------

    def moment(self, question: str | None = None) -> Moment:
        """Where the conversation stands now; it shares nothing with what comes after."""
        standing = {name: copy.deepcopy(getattr(self, name)) for name in _STANDING}
        return Moment(self.engine.snapshot(), standing, question)

    def go_back(self, moment: Moment) -> None:
        """Continues from a moment, which stays usable."""
        self.engine.restore(moment.engine)
        self._stand(copy.deepcopy(moment.standing))

    def _stand(self, standing: dict[str, Any]) -> None:
        self.system = standing["system"]
        self._forget()
        for name, value in standing.items():
            setattr(self, name, value)
        if self._opened:  # the pieces around a turn that was begun
            self._opened = False
            self._open_turn()
            self._before = standing["_before"]

    def undo(self) -> str:
        """Takes the last question and its answer back; returns the question.

        Raises:
            UsageError: there is none that could be.
        """
        if not self._moments:
            raise UsageError(
                "there is nothing to take back", hint=f"the last {MOMENTS} questions can be"
            )
        moment = self._moments.pop()
        self.go_back(moment)
        return moment.question

    def last_reply(self) -> str:
        """What the model said last.

        Raises:
            UsageError: nothing yet, or it was taken back.
        """
        if self.reply_start is None:
            raise UsageError("nothing was answered yet", hint="ask something first")
        return self.messages[-1]["content"]

    def save_state(self, path: Path) -> None:
        """Writes the conversation with all that was read; errors as `Engine.save`."""
        self.engine.save(path, {name: getattr(self, name) for name in _STANDING})
        self.states.add(path)

    def load_state(self, path: Path) -> None:
        """Goes on where `save_state` left off; errors as `Engine.load`."""
        standing = self.engine.load(path)
        standing["_documents"] = [tuple(pair) for pair in standing["_documents"]]
        self._moments.clear()
        self._stand(standing)
        self.states.add(path)

    def set_budget(self, pairs: int) -> None:
        """Starts a new conversation that keeps `pairs` per KV head.

        Raises:
            UsageError: not a converted model, or no pairs are left beside sinks and window.
        """
        self.engine.set_budget(pairs)
        self.forks.clear()
        self.clear()

    def fork(self, name: str) -> None:
        """Keeps the conversation as it stands under a name."""
        self.forks[name] = self.moment()

    def switch(self, name: str) -> None:
        """Continues the conversation kept under a name; keep the present one first if need be.

        Raises:
            UsageError: no such name.
        """
        if name not in self.forks:
            hint = f"there are: {', '.join(self.forks)}" if self.forks else "/fork NAME makes one"
            raise UsageError(f"no fork is called '{name}'", hint=hint)
        self._moments.clear()
        self.go_back(self.forks[name])

    # How it gets into the cache -------------------------------------------------------------

    def _forget(self) -> None:
        self._before = ""  # the open turn's opening, not fed yet
        self._pending = ""  # the user's text in the open turn, not fed yet
        self._opened = False  # whether the user turn's opening is fed or pending
        self._documents: list[tuple[str, str]] = []  # of the open turn: name, and text if unread
        self._full: list[dict[str, str]] = []  # the conversation with its documents, for renders
        self._fed_ids: list[int] = []  # kept only for templates that cannot be cut
        self._pieces: TurnPieces | None = None
        self.reply_start: int | None = None  # tokens before the last reply
        following = None if self.plain else turn_pieces(self.tokenizer, self.system, first=False)
        self._whole_renders = not self.plain and (
            following is None or turn_pieces(self.tokenizer, self.system, first=True) is None
        )
        # What closes a reply in this template (<|im_end|>, <|eot_id|>) ends one, too.
        closing = self._encode(following.before, first=False)[:1] if following else []
        self.stop_tokens = stop_tokens(self.engine.model, self.tokenizer, closing)

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
                hint="start again with /clear; a template that always fails is to be mended: "
                "chat_template.jinja (or chat_template in tokenizer_config.json)",
            ) from error
        kept = len(self._fed_ids)
        if ids[:kept] != self._fed_ids or kept != self.engine.tokens or kept >= len(ids):
            self.engine.reset()
            kept = 0
        self._fed_ids = ids
        return self.engine.feed(ids[kept:])
