"""The conversation at a terminal: lines in, replies out, and commands that start with a slash."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from sparsek_cli.chat.engine import Sampling
from sparsek_cli.chat.figures import size, status_line
from sparsek_cli.chat.session import Session
from sparsek_cli.errors import SparsekError, UsageError

HELP = """\
/load FILE       read a text file into the next question
/clear           forget the conversation
/system [TEXT]   set (or drop) the system message; starts a new conversation
/set [key=value] temperature, top_p, max_new_tokens, seed; alone: show them
/stats           what the conversation holds
/save FILE       write the conversation (.json, or text)
/help            this list
/exit            leave (Ctrl-D too)
Ctrl-C stops a reply; Alt-Enter starts a new line."""

ProgressMaker = Callable[[str, float], AbstractContextManager[Any]]


class Repl:
    """Reads lines until the user leaves.

    Args:
        session: the conversation.
        say: prints a message that is not part of a reply.
        progress: opens a progress bar (description, total) with `advance(steps)`.
    """

    def __init__(self, session: Session, *, say: Callable[[str], None], progress: ProgressMaker):
        self.session = session
        self.say = say
        self.progress = progress
        self.commands: dict[str, Callable[[str], None]] = {
            "/load": self._load,
            "/clear": self._clear,
            "/system": self._system,
            "/set": self._set,
            "/stats": self._stats,
            "/save": self._save,
            "/help": lambda rest: self.say(HELP),
        }

    def run(self, read_line: Callable[[], str]) -> None:
        """Until /exit or the end of input; an empty line or a Ctrl-C at the prompt does nothing."""
        while True:
            try:
                line = read_line()
            except EOFError:
                return
            except KeyboardInterrupt:
                continue
            if line.strip() in ("/exit", "/quit"):
                return
            try:
                self.handle(line)
            except SparsekError as error:
                self.say(
                    f"error: {error.message}" + (f"\nhint: {error.hint}" if error.hint else "")
                )

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
        """Streams one reply to stdout."""
        for piece in self.session.ask(question):
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
        sys.stdout.flush()
        if self.session.engine.interrupted:
            self.say("(stopped)")

    def status(self) -> str:
        """The status line, for the toolbar."""
        engine = self.session.engine
        return status_line(self.session.stats(), sparse=engine.sparse, limit=engine.context_limit)

    def _load(self, rest: str) -> None:
        if not rest:
            raise UsageError("/load needs a file", hint="/load FILE")
        load_file(self.session, rest, progress=self.progress)
        read = self.session.engine.tokens
        stopped = " (stopped; the rest was not read)" if self.session.engine.interrupted else ""
        self.say(f"read {rest}: {read:,} tokens in context{stopped}; now ask about it")

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
        rows = [
            ("context", f"{stats.context_tokens:,} tokens"),
            (
                "model's context",
                f"{engine.context_limit:,} tokens" if engine.context_limit else "?",
            ),
            ("KV cache now", size(stats.kv_bytes)),
            ("dense would hold", size(stats.dense_kv_bytes)),
            ("last reply", f"{stats.reply_tokens} tokens, {stats.tokens_per_second:.1f} tokens/s"),
        ]
        self.say("\n".join(f"{name:<17} {value}" for name, value in rows))

    def _save(self, rest: str) -> None:
        if not rest:
            raise UsageError("/save needs a file", hint="/save FILE")
        save_conversation(self.session, Path(rest).expanduser())
        self.say(f"wrote {rest}")


def changed(sampling: Sampling, assignment: str) -> Sampling:
    """A copy of the settings with `key=value` (or `key value`) applied.

    Raises:
        UsageError: no such key, no value, or a value out of range.
    """
    key, _, value = assignment.replace("=", " ", 1).strip().partition(" ")
    value = value.strip()
    known = {f.name: f.type for f in fields(Sampling)}
    if key not in known:
        near = get_close_matches(key, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"/set knows {', '.join(known)}"
        raise UsageError(f"/set has no key '{key}'", hint=hint)
    if not value:
        raise UsageError(
            f"/set {key} needs a value", hint=f"for instance /set {key}={getattr(Sampling(), key)}"
        )
    kind = type(getattr(Sampling(), key))
    try:
        new = Sampling(**{**vars(sampling), key: kind(value)})
    except ValueError as error:
        raise UsageError(
            f"{key}={value} is not {'a whole number' if kind is int else 'a number'}",
            hint=f"for instance /set {key}={getattr(Sampling(), key)}",
        ) from error
    check_sampling(new)
    return new


def check_sampling(sampling: Sampling) -> None:
    """Raises UsageError for settings that mean nothing."""
    if not 0 <= sampling.temperature <= 100:
        raise UsageError(
            f"temperature {sampling.temperature} is out of range", hint="0 is greedy, 1 is plain"
        )
    if not 0 < sampling.top_p <= 1:
        raise UsageError(f"top_p {sampling.top_p} is out of range", hint="it is above 0, up to 1")
    if sampling.max_new_tokens < 1:
        raise UsageError(
            f"max_new_tokens {sampling.max_new_tokens} is out of range", hint="it is at least 1"
        )


def load_file(session: Session, file: str, *, progress: ProgressMaker) -> bool:
    """Reads a UTF-8 text file into the open turn; False when Ctrl-C stopped it.

    Raises:
        UsageError: no such file, a folder, not UTF-8, or empty.
    """
    path = Path(file).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = get_close_matches(path.name, beside, n=1)
        hint = f"did you mean '{path.parent / near[0]}'?" if near else "check the path"
        raise UsageError(f"no such file: '{file}'", hint=hint) from error
    except UnicodeDecodeError as error:
        raise UsageError(
            f"'{file}' is not UTF-8 text (byte {error.start})",
            hint="convert it (iconv -t utf-8); of a PDF or Word file, extract the text first",
        ) from error
    except OSError as error:
        raise UsageError(
            f"cannot read '{file}': {error.strerror}", hint="check the path"
        ) from error
    with progress(f"reading {path.name}", len(text)) as bar:
        return session.load(text, path.name, on_progress=bar.advance)


def save_conversation(session: Session, path: Path) -> None:
    """Writes what was said as JSON (.json) or as text.

    Raises:
        SparsekError: the file cannot be written.
    """
    import json

    if path.suffix == ".json":
        text = json.dumps({"system": session.system, "messages": session.messages}, indent=2)
    else:
        start = [f"system: {session.system}"] if session.system else []
        text = "\n\n".join([*start, *(f"{m['role']}: {m['content']}" for m in session.messages)])
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise SparsekError(
            f"cannot write '{path}': {error.strerror}", hint="choose another file"
        ) from error


def terminal_reader(repl: Repl, history: Path) -> Callable[[], str]:
    """A line editor: history, completion of commands, pasted newlines kept, status below."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("enter")
    def _(event: Any) -> None:
        event.current_buffer.validate_and_handle()

    try:
        history.parent.mkdir(parents=True, exist_ok=True)
        history.touch()
        past = FileHistory(str(history))
    except OSError:
        past = InMemoryHistory()
    words = WordCompleter([*repl.commands, "/exit"], sentence=True)
    prompt: PromptSession[str] = PromptSession(
        history=past,
        auto_suggest=AutoSuggestFromHistory(),
        completer=words,
        complete_while_typing=False,
        key_bindings=keys,
        multiline=True,
        prompt_continuation="  ",
        bottom_toolbar=lambda: repl.status(),
    )
    return lambda: prompt.prompt("> ")
