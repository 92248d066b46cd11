"""A conversation as an append-only stream of text: documents, turns, replies, and ways back."""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsek_cli.data.pieces import Encoder, Reply, pieces_of, stripped
from sparsek_cli.dialogue.drawing.sampling import Sampling
from sparsek_cli.dialogue.engine import Engine, Snapshot
from sparsek_cli.dialogue.feeding import Feed
from sparsek_cli.dialogue.figures import Clock, Stats
from sparsek_cli.dialogue.given_text import check_text, checked_parts
from sparsek_cli.dialogue.template import check_system
from sparsek_cli.errors import SparsekError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOMENTS = 8  # questions that /undo can take back; each keeps a copy of the cache


@dataclass
class Moment:
    """Where a conversation stood, to go back to.

    Attributes:
        engine: what `Engine.snapshot` gave. standing: what `Session` says of itself, copied.
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
        feed: how text gets into the engine's cache.
        reply_start: tokens before the last reply; None where there is none.
    """

    engine: Engine
    tokenizer: "PreTrainedTokenizerBase"
    sampling: Sampling = field(default_factory=Sampling)
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._encode = Encoder(self.tokenizer)
        self._clock = Clock()
        self._moments: list[Moment] = []
        self.forks: dict[str, Moment] = {}
        self.states: set[Path] = set()  # files of states, written here or gone on from
        self._forget()
        if self.system:
            self.set_system(self.system)

    @property
    def plain(self) -> bool:
        """Whether the tokenizer has no chat template: text is simply continued."""
        return self.feed.plain

    @property
    def stop_tokens(self) -> frozenset[int]:
        """Ids that end a reply."""
        return self.feed.stop_tokens

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
        moment: Moment | None = None,
    ) -> bool:
        """Reads a document into the turn that the next question will end.

        Args:
            text: all of it, or its parts one after the other, which are then not kept.
            name: what `/save` calls it.
            on_progress: called with the number of characters read since the last call.
            moment: where to go back to if that fails; default: now, which copies the cache.

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
        with self.unharmed(moment):
            return self.feed.read(name, first, parts, on_progress)

    def ask(self, question: str) -> Iterator[str]:
        """Feeds the question and yields the reply as it comes, piece by piece.

        The reply counts as said even if the caller stops listening.

        Raises:
            UsageError: there is nothing to answer, or it is not valid Unicode.
        """
        check_text(question, "the question")
        if not question.strip() and not self.feed.documents:
            raise UsageError("nothing to answer", hint="write a question")
        moment = self.moment(question)
        with self.unharmed(moment):
            self._moments = [*self._moments[1 - MOMENTS :], moment]
            yield from self._answer(question)

    def _answer(self, question: str) -> Iterator[str]:
        self._clock = Clock()
        named = [f"[{name}]" for name, _ in self.feed.documents]
        said = "\n\n".join([*named, question] if question.strip() else named)
        read = self.feed.ask(question)
        self.messages.append({"role": "user", "content": said})
        if not read:
            return
        self.feed.answering()
        reply = Reply(self.tokenizer)
        self.reply_start = len(self.engine.heard)
        try:
            tokens = self.engine.stream(self.sampling, self.stop_tokens)
            yield from reply.pieces(self._clock.timed(tokens))
        finally:
            self.messages.append({"role": "assistant", "content": reply.text})
            self.feed.answered(reply.text, reply.ids)

    def stats(self) -> Stats:
        """Where the conversation stands now."""
        return Stats(
            context_tokens=self.engine.tokens,
            kv_bytes=self.engine.kv_bytes,
            dense_kv_bytes=self.engine.dense_kv_bytes,
            tokens_per_second=self._clock.rate,
            reply_tokens=self._clock.tokens,
            first_token_seconds=self._clock.first,
            reply_at_limit=self.engine.at_limit,
        )

    # Going back ---------------------------------------------------------------------------------

    def moment(self, question: str | None = None) -> Moment:
        """Where the conversation stands now; it shares nothing with what comes after."""
        return Moment(self.engine.snapshot(), copy.deepcopy(self._standing()), question)

    def go_back(self, moment: Moment) -> None:
        """Continues from a moment, which stays usable."""
        self.engine.restore(moment.engine)
        self._stand(copy.deepcopy(moment.standing))

    @contextmanager
    def unharmed(self, moment: Moment | None = None) -> Iterator[None]:
        """Where the block fails in a way nobody foresaw, the conversation is as it was before it.

        A cache whose layers were stopped at different tokens would answer nonsense.

        Args:
            moment: of now or of earlier, where the caller has it already.
        """
        moment, moments = moment or self.moment(), [*self._moments]
        try:
            yield
        except SparsekError:
            raise
        except (Exception, KeyboardInterrupt):
            self.go_back(moment)
            self._moments = moments
            raise

    def _standing(self) -> dict[str, Any]:
        """What a conversation is beside the engine's cache, by the names that saved ones have."""
        fed = {f"_{name}": getattr(self.feed, name) for name in Feed.STANDING}
        return {"system": self.system, "messages": self.messages, **fed}

    def _stand(self, standing: dict[str, Any]) -> None:
        self.system, self.messages = standing["system"], standing["messages"]
        self._forget()
        self.feed.stand({name: standing[f"_{name}"] for name in Feed.STANDING})

    def _forget(self) -> None:
        self.feed = Feed(self.engine, self._encode, self.tokenizer, self.system)
        self.reply_start: int | None = None

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
        self.engine.save(path, self._standing())
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
