"""The conversation at a terminal: lines in, replies out, and commands that start with a slash."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import fields, replace
from difflib import get_close_matches
from pathlib import Path

from sparsek_cli.byte_units import size
from sparsek_cli.dialogue.compare import dense_reply
from sparsek_cli.dialogue.drawing.settings import changed
from sparsek_cli.dialogue.figures import beyond, status_line
from sparsek_cli.dialogue.files import ProgressMaker, load_path, save_conversation
from sparsek_cli.dialogue.session import Session
from sparsek_cli.errors import SparsekError, UsageError, out_of_memory, reason
from sparsek_cli.loading.positions import can_stretch
from sparsek_cli.output.place import absolute, check_file, check_not_inside
from sparsek_cli.termination import Terminated

HELP = """\
/load PATH       read a text file, or a folder's, into the next question
/retry           ask the last question again (another seed, if answers are drawn)
/undo            take the last question and its answer back
/compare         the dense model's answer to the last question, beside this one
/fork [NAME]     keep the conversation under a name and go on; alone: list them
/switch NAME     continue a kept one
/save-state FILE write what was read, to go on later without reading it again
/load-state FILE go on from there
/budget [N]      keep N pairs per head from now on (a new conversation); alone: show it
/clear           forget the conversation
/system [TEXT]   set (or drop) the system message; starts a new conversation
/set [key=value] temperature, top_p, max_new_tokens, seed; alone: show them
/stats           what the conversation holds
/save FILE       write the conversation (.json, text, or a line more of a .jsonl)
/help            this list
/exit            leave (Ctrl-D too)
Ctrl-C stops a reply; Alt-Enter starts a new line."""


class Repl:
    """Reads lines until the user leaves.

    Args:
        session: the conversation.
        say: prints a message that is not part of a reply. show: prints a piece of a reply.
        progress: opens a progress bar (description, total) with `advance(steps)`.
    """

    def __init__(
        self,
        session: Session,
        *,
        say: Callable[[str], None],
        show: Callable[[str], None],
        progress: ProgressMaker,
    ):
        self.session = session
        self.say, self.show = say, show
        self.progress = progress
        self._saved: set[Path] = set()
        self._said_beyond = False
        self.commands: dict[str, Callable[[str], None]] = {
            "/load": self._load,
            "/retry": self._retry,
            "/undo": self._undo,
            "/compare": self._compare,
            "/fork": self._fork,
            "/switch": self._switch,
            "/save-state": self._save_state,
            "/load-state": self._load_state,
            "/budget": self._budget,
            "/clear": self._clear,
            "/system": self._system,
            "/set": self._set,
            "/stats": self._stats,
            "/save": self._save,
            "/help": lambda rest: self.say(HELP),
        }

    takes_path = frozenset({"/load", "/save", "/save-state", "/load-state"})

    def run(self, read_line: Callable[[], str]) -> None:
        """Until /exit or the end of input; an empty line or a Ctrl-C at the prompt does nothing."""
        while True:
            try:
                line = read_line()
            except EOFError:
                return
            except Terminated:
                raise
            except KeyboardInterrupt:
                continue
            if line.strip() in ("/exit", "/quit"):
                return
            try:
                self.handle(line)
            except Terminated:
                raise
            except KeyboardInterrupt:
                self.say("(stopped)")
            except Exception as error:
                # A line that fails, for whatever reason, is no reason to forget what was read.
                self.say(_told(error))

    def handle(self, line: str) -> None:
        """One line: a command, or something to answer."""
        if not line.strip():
            return
        if line.startswith("/"):
            word, _, rest = line.partition(" ")
            command = self.commands.get(word)
            if command is None:
                near = get_close_matches(word, [*self.commands, "/exit"], n=1)
                hint = f"did you mean {near[0]}?" if near else "/help lists the commands"
                raise UsageError(f"unknown command {word}", hint=hint)
            command(rest.strip())
            return
        self.answer(line)

    def answer(self, question: str) -> None:
        """Shows one reply as it comes."""
        self._stream(self.session.ask(question))
        if self.session.engine.interrupted:
            self.say("(stopped)")
        self._say_beyond()

    def _say_beyond(self) -> None:
        """Once, where the context is longer than the model was made for."""
        engine = self.session.engine
        stretches = can_stretch(engine.model.config)
        said = beyond(engine.tokens, engine.context_limit, stretches=stretches)
        if said and not self._said_beyond:
            self.say(said)
            self._said_beyond = True

    def _stream(self, pieces: Iterator[str]) -> None:
        with closing(pieces):
            for piece in pieces:
                self.show(piece)
        self.show("\n")

    def status(self) -> str:
        """The status line, for the toolbar."""
        engine = self.session.engine
        return status_line(self.session.stats(), sparse=engine.sparse, limit=engine.context_limit)

    def _load(self, rest: str) -> None:
        if not rest:
            raise UsageError("/load needs a file or folder", hint="/load PATH")
        load_path(self.session, rest, progress=self.progress)
        read = self.session.engine.tokens
        stopped = " (stopped; the rest was not read)" if self.session.engine.interrupted else ""
        self.say(f"read {rest}: {read:,} tokens in context{stopped}; now ask about it")
        self._say_beyond()

    def _retry(self, rest: str) -> None:
        with self.session.unharmed():
            self._answer_again(self.session.undo())

    def _answer_again(self, question: str) -> None:
        sampling = self.session.sampling
        if sampling.temperature > 0:
            self.session.sampling = replace(sampling, seed=sampling.seed + 1)
        else:
            self.say("temperature is 0, so the answer will be the same: /set temperature=0.7")
        self.answer(question)

    def _undo(self, rest: str) -> None:
        question = self.session.undo()
        self.say(f"took back: {question.splitlines()[0][:60] if question.strip() else '(nothing)'}")

    def _compare(self, rest: str) -> None:
        sparse = self.session.last_reply()
        self.say(f"sparse:\n{sparse}\n\ndense, reading {self.session.reply_start:,} tokens again:")
        self._stream(dense_reply(self.session))

    def _fork(self, rest: str) -> None:
        if rest:
            self.session.fork(rest)
            self.say(f"kept as '{rest}'; /switch {rest} goes back to it")
        else:
            kept = [f"{name}: {m.engine.fed:,} tokens" for name, m in self.session.forks.items()]
            self.say("\n".join(kept) or "there are no forks; /fork NAME makes one")

    def _switch(self, rest: str) -> None:
        self.session.switch(rest)
        self.say(f"continuing '{rest}': {self.session.engine.tokens:,} tokens in context")

    def _save_state(self, rest: str) -> None:
        if not rest:
            raise UsageError("/save-state needs a file", hint="/save-state FILE")
        file = absolute(rest)
        self._check(file, own=file in self.session.states)
        self.session.save_state(file)
        self.say(f"wrote {rest}")

    def _load_state(self, rest: str) -> None:
        if not rest:
            raise UsageError("/load-state needs a file", hint="/load-state FILE")
        self.session.load_state(absolute(rest))
        self.say(f"continuing {rest}: {self.session.engine.tokens:,} tokens in context")

    def _budget(self, rest: str) -> None:
        if rest:
            try:
                pairs = int(rest)
            except ValueError as error:
                raise UsageError(
                    f"/budget {rest[:40]} is no whole number", hint="for instance /budget 256"
                ) from error
            self.session.set_budget(pairs)
        self.say(self.session.engine.budget() + ("; new conversation" if rest else ""))

    def _clear(self, rest: str) -> None:
        self.session.clear()
        self.say("new conversation")

    def _system(self, rest: str) -> None:
        self.session.set_system(rest or None)
        self.say("new conversation " + ("under this system message" if rest else "without one"))

    def _set(self, rest: str) -> None:
        sampling = self.session.sampling
        if rest:
            self.session.sampling = changed(sampling, rest)
        self.say(
            "  ".join(
                f"{f.name}={getattr(self.session.sampling, f.name)}" for f in fields(sampling)
            )
        )

    def _stats(self, rest: str) -> None:
        stats, engine = self.session.stats(), self.session.engine
        cut = " (cut: /set max_new_tokens)" if stats.reply_at_limit else ""
        rows = [
            ("context", f"{stats.context_tokens:,} tokens"),
            (
                "model's context",
                f"{engine.context_limit:,} tokens" if engine.context_limit else "?",
            ),
            ("KV cache now", size(stats.kv_bytes)),
            ("dense would hold", size(stats.dense_kv_bytes)),
            (
                "last reply",
                f"{stats.reply_tokens} tokens{cut}, {stats.tokens_per_second:.1f} tokens/s",
            ),
            ("first token", f"{stats.first_token_seconds:.2f} s after the question"),
        ]
        self.say("\n".join(f"{name:<17} {value}" for name, value in rows))

    def _save(self, rest: str) -> None:
        if not rest:
            raise UsageError("/save needs a file", hint="/save FILE")
        file = absolute(rest)
        self._check(file, own=file in self._saved)
        save_conversation(self.session, file)
        self._saved.add(file)
        self.say(f"wrote {rest}")

    def _check(self, file: Path, *, own: bool) -> None:
        """Raises UsageError where a file stands that is not this conversation's own.

        And within a model's folder, which `push` and --overwrite would then refuse.
        """
        try:
            check_not_inside(file, None)
            check_file(file, overwrite=own, suffixes=(file.suffix.lower(),))
        except UsageError as error:
            new = "name a file that does not exist yet"  # no line here takes --overwrite
            hint = new if os.path.lexists(file) else error.hint
            raise UsageError(error.message.removeprefix("OUT "), hint=hint) from error


def _told(error: Exception) -> str:
    """What a person reads of a line that failed."""
    if not isinstance(error, SparsekError):
        logging.getLogger(__name__).info("this line failed", exc_info=error)  # under -v
        hint = "the conversation stands as before; chat -v shows where it happened"
        if out_of_memory(error):
            hint = "/clear, or a smaller /budget, gives memory back; the conversation stands"
        return f"error: {reason(error)}\nhint: {hint}"
    return f"error: {error.message}" + (f"\nhint: {error.hint}" if error.hint else "")
