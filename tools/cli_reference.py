"""Writes docs/cli.md: every verb and flag as `--help` knows them.

python tools/cli_reference.py            # writes; a test fails where it was forgotten
"""

from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[1] / "docs" / "cli.md"
HEAD = """# Command line

Made by `python tools/cli_reference.py` from the commands themselves. In every verb that has a
recipe, its keys may stand in the line as `key.sub=value`. A flag wins over a word, a word over the
recipe.

`sparsek --install-completion` teaches the shell (bash, zsh, fish, PowerShell) to complete verbs and
flags with the tab key; `--show-completion` prints what it would add, to put elsewhere.
"""


def reference() -> str:
    """The page as it should be."""
    from typer.main import get_command

    from sparsek_cli.app import app

    root = get_command(app)
    return "\n".join(
        [HEAD, *(_verb(f"sparsek {name}", root.commands[name]) for name in _shown(root))]
    )


def _shown(group: Any) -> list[str]:
    return [name for name, command in group.commands.items() if not command.hidden]


def _verb(name: str, command: Any) -> str:
    about = " ".join((command.help or "").split("\n\n")[0].split())
    if getattr(command, "commands", None):
        parts = [_verb(f"{name} {inner}", command.commands[inner]) for inner in _shown(command)]
        return "\n".join([f"## `{name}`\n", f"{about}\n", *parts])
    rows = [row for parameter in command.params if (row := _row(parameter))]
    level = "##" if name.count(" ") == 1 else "###"
    return "\n".join([f"{level} `{name}`\n", f"{about}\n", "| | |", "|---|---|", *rows, ""])


def _row(parameter: Any) -> str | None:
    if "--help" in parameter.opts or getattr(parameter, "hidden", False):
        return None
    help_text = " ".join((getattr(parameter, "help", None) or "").split()).replace("|", "\\|")
    metavar = (parameter.metavar or "").replace("|", "\\|")
    if parameter.param_type_name == "argument":
        return f"| `{metavar or parameter.name.upper()}` | {help_text} |"
    written = ", ".join(f"`{option}`" for option in parameter.opts)
    return f"| {written}{f' {metavar}' if metavar else ''} | {help_text} |"


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
