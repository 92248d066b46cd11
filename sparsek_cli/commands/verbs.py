"""The verbs by name, each imported when it is used; the help that lists them needs only lines."""

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperArgument, TyperGroup

# What `sparsek --help` shows: first sentences of the verbs' own help, which a test compares.
ABOUT = {
    "convert": "Give a model SparseK attention: MODEL (folder, GGUF file, hub id or name) becomes "
    "OUT.",
    "finetune": "Train MODEL and write OUT: its scorers, adapters, or all of it; or a model from "
    "scratch.",
    "evaluate": "Measure a model on long-context tasks against its dense self and others at equal "
    "bytes.",
    "chat": "Talk to a model; its cache stays the same size however long the text.",
    "serve": "Serve a converted model over the OpenAI API, on vLLM where its plugin is installed.",
    "export": "The way back: the plain dense model in MODEL, for any program, becomes OUT.",
    "merge": "Put scorers onto the base they were made for: BASE and SCORERS become OUT.",
    "push": "Send FOLDER to the Hugging Face hub with a card: licence, base, and what was "
    "measured.",
    "bench": "Time the kernels beside their rivals: same process, same random data, checked first.",
    "doctor": "Check the installation, and with MODEL a converted checkpoint; exit 1 if a check "
    "fails.",
    "recipes": "List, show and copy recipes.",
}
HIDDEN = {"eval": "evaluate"}  # other names of verbs


class Verbs(TyperGroup):
    """The root command. `commands` has all verbs, of which only those asked for are imported."""

    def __init__(self, **attributes: Any):
        super().__init__(**attributes)
        self.commands = _ByName()

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """The list under --help, of `ABOUT`: whole sentences, which typer itself would cut."""
        with formatter.section("Commands"):
            formatter.write_dl(list(ABOUT.items()))


class _ByName(Mapping):
    """Commands by verb, made of sparsek_cli/commands/VERB.py when they are looked up."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def __iter__(self) -> Iterator[str]:
        return iter([*ABOUT, *HIDDEN])

    def __len__(self) -> int:
        return len(ABOUT) + len(HIDDEN)

    def __contains__(self, name: object) -> bool:
        return name in ABOUT or name in HIDDEN

    def __getitem__(self, name: str) -> Any:
        if name not in self:
            raise KeyError(name)
        if name not in self._made:
            self._made[name] = _command(name)
        return self._made[name]


def _command(name: str) -> Any:
    """The command of a verb, or the group of commands that its module has as `app`."""
    verb = HIDDEN.get(name, name)
    module = import_module(f"sparsek_cli.commands.{verb}")
    own = getattr(module, "app", None)
    if own is None:
        own = typer.Typer(
            add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
        )
        own.command(name, hidden=name in HIDDEN)(getattr(module, verb))
    command = typer.main.get_command(own)
    command.name = name
    for one in (command, *getattr(command, "commands", {}).values()):
        _leave_types_out(one)
    return command


def _leave_types_out(command: Any) -> None:
    """An argument has a name in its help; typer puts `<list[str]>` behind it."""
    for parameter in command.params:
        if isinstance(parameter, TyperArgument):
            parameter.display_type_rich = lambda ctx: ""
