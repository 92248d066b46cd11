"""Text on its way into the cache: documents and the question that ends their turn.

Only new tokens are ever fed. A loaded document and the next question stand in one user turn, so
that the document can be read (in chunks, in the constant memory of the cache) before anyone knows
the question.
"""

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

from sparsek_cli.data.pieces import Encoder, safe_cut
from sparsek_cli.dialogue.engine import Engine
from sparsek_cli.dialogue.interrupt import interruptible
from sparsek_cli.dialogue.template import TurnPieces, render, stop_tokens, turn_pieces
from sparsek_cli.errors import SparsekError

HELD_BACK = 512  # characters at the end of a document that are tokenized with what follows


class Feed:
    """The text of one conversation, fed to an engine turn by turn.

    Attributes:
        plain: no chat template: text is simply continued.
        whole: the template cannot be cut, so the conversation is rendered anew for each question.
        stop_tokens: ids that end a reply.
        before: the open turn's opening, not fed yet.
        pending: the user's text in the open turn, not fed yet.
        opened: whether the user turn's opening is fed or pending.
        documents: of the open turn: name, and text if unread.
        full: the conversation with its documents, for renders.
        fed_ids: kept only for templates that cannot be cut.
    """

    STANDING = ("before", "pending", "opened", "documents", "full", "fed_ids")

    def __init__(self, engine: Engine, encode: Encoder, tokenizer: Any, system: str | None):
        self._engine, self._encode, self._tokenizer = engine, encode, tokenizer
        self._system = system
        self.plain = not getattr(tokenizer, "chat_template", None)
        self.before = self.pending = ""
        self.opened = False
        self.documents: list[tuple[str, str]] = []
        self.full: list[dict[str, str]] = []
        self.fed_ids: list[int] = []
        self._pieces: TurnPieces | None = None
        following = None if self.plain else turn_pieces(tokenizer, system, first=False)
        self.whole = not self.plain and (
            following is None or turn_pieces(tokenizer, system, first=True) is None
        )
        # What closes a reply in this template (<|im_end|>, <|eot_id|>) ends one, too.
        closing = encode(following.before, first=False)[:1] if following else []
        self.stop_tokens = stop_tokens(engine.model, tokenizer, closing)

    def stand(self, standing: dict[str, Any]) -> None:
        """Continues from what the fields of `STANDING` were; the engine is as it was then."""
        for name in self.STANDING:
            setattr(self, name, standing[name])
        if self.opened:  # the pieces around a turn that was begun
            self.opened = False
            self._open_turn()
            self.before = standing["before"]

    def read(
        self,
        name: str,
        first: tuple[str, bool],
        parts: Iterable[tuple[str, bool]],
        on_progress: Callable[[int], None] | None,
    ) -> bool:
        """Feeds a document into the open turn, or keeps it where turns cannot be cut.

        Args:
            first, parts: its blocks, and of each whether it is the last.
            on_progress: called with the number of characters read since the last call.

        Returns:
            False when Ctrl-C stopped it; what was read stays.
        """
        if self.whole:
            self.documents.append((name, "".join(part for part, _ in chain([first], parts))))
            return True
        self._open_turn()
        if self.documents:
            self.pending += "\n\n"
        self.documents.append((name, ""))  # read now, so not needed again
        with interruptible() as stop:
            for block, last in chain([first], parts):
                self.pending += block
                cut = safe_cut(self.pending, HELD_BACK if last else 0)
                ready, self.pending = self.pending[:cut], self.pending[cut:]
                self.feed_text(ready)
                self.before = ""
                if on_progress is not None:
                    on_progress(len(block))
                if stop.is_set():
                    self.pending = ""
                    return False
        return True

    def ask(self, question: str) -> bool:
        """Ends the turn with a question; False when Ctrl-C stopped it."""
        read = self._feed_whole(question) if self.whole else self._feed_turn(question)
        self.documents.clear()
        return read

    def answering(self) -> None:
        """A reply begins: the turn is over."""
        self.opened = False

    def answered(self, text: str, ids: list[int]) -> None:
        """What the model has said, and fed to itself."""
        if self.whole:
            self.full.append({"role": "assistant", "content": text})
            self.fed_ids += ids

    def feed_text(self, text: str, after: str = "") -> bool:
        """Feeds what waits before a text, the text, and the template's own end of the turn."""
        first = not self._engine.fed
        ids = self._encode(self.before, text, after, first=first, plain=self.plain)
        return not ids or self._engine.feed(ids)

    def _open_turn(self) -> None:
        if self.opened:
            return
        self.opened = True
        first = not self._engine.fed
        if self.plain:
            self._pieces = TurnPieces("" if first else "\n", "")
        else:
            self._pieces = turn_pieces(self._tokenizer, self._system, first=first)
        self.before = self._pieces.before

    def _feed_turn(self, question: str) -> bool:
        self._open_turn()
        gap = "\n\n" if self.documents and question.strip() else ""
        read = self.feed_text(self.pending + gap + question, self._pieces.after)
        self.before = self.pending = ""
        return read

    def _feed_whole(self, question: str) -> bool:
        """For templates that cannot be cut: render all, feed what is new, else start over."""
        content = "\n\n".join([*(text for _, text in self.documents), question])
        self.full.append({"role": "user", "content": content})
        start = [{"role": "system", "content": self._system}] if self._system else []
        try:
            ids = self._encode(render(self._tokenizer, [*start, *self.full]), first=True)
        except Exception as error:
            self.full.pop()
            raise SparsekError(
                f"the chat template failed: {(str(error).splitlines() or [''])[0]}",
                hint="start again with /clear; a template that always fails is to be mended: "
                "chat_template.jinja (or chat_template in tokenizer_config.json)",
            ) from error
        kept = len(self.fed_ids)
        if ids[:kept] != self.fed_ids or kept != self._engine.tokens or kept >= len(ids):
            self._engine.reset()
            kept = 0
        self.fed_ids = ids
        return self._engine.feed(ids[kept:])
