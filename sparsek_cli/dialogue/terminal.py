"""The line that a person types into."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsek_cli.dialogue.repl import Repl


def terminal_reader(repl: Repl, history: Path) -> Callable[[], str]:
    """A line editor: history, completion of commands, pasted newlines kept, status below."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
    from prompt_toolkit.completion import NestedCompleter, PathCompleter
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
    paths = PathCompleter(expanduser=True)
    words = NestedCompleter(
        {word: paths if word in repl.takes_path else None for word in [*repl.commands, "/exit"]}
    )
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
