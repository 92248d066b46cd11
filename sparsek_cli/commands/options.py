"""Flags that several verbs share: defined once, so that they read and work the same everywhere.

A flag's default is None wherever "not given" must be told from a value, because a recipe ranks
between the flag and the default.
"""

from typing import Annotated, Any, Protocol

import typer

from sparsek_cli.console import Console
from sparsek_cli.errors import UsageError


class Plan(Protocol):
    """What every verb's plan can tell."""

    def text(self) -> str: ...

    def data(self) -> dict[str, Any]: ...


_WORDS = "then any recipe keys as key.sub=value; they rank between flags and the recipe."
Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="MODEL OUT key=value",
        help=f"Folder, hub id or short name; the folder to write; {_WORDS}",
        show_default=False,
    ),
]
ModelWords = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="MODEL key=value",
        help=f"Folder, hub id or short name; {_WORDS}",
        show_default=False,
    ),
]
Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="Folder, hub id or short name; default: the last model made here, else `tiny`.",
        show_default=False,
    ),
]
Revision = Annotated[
    str | None,
    typer.Option("--revision", metavar="REV", help="Branch, tag or commit of a hub model."),
]
Recipe = Annotated[
    str | None,
    typer.Option("--recipe", metavar="FILE|NAME", help="Recipe; `sparsek recipes list` shows."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")]
Seed = Annotated[int | None, typer.Option("--seed", metavar="N", help="Random seed.")]
Device = Annotated[
    str | None,
    typer.Option("--device", metavar="DEV", help="auto, cpu, cuda or cuda:N [auto]."),
]
Dtype = Annotated[
    str | None,
    typer.Option("--dtype", metavar="TYPE", help="auto, bfloat16, float16 or float32 [auto]."),
]
CacheDtype = Annotated[
    str | None,
    typer.Option("--cache-dtype", metavar="TYPE", help="What the cache holds: auto or int8."),
]
Yarn = Annotated[
    float | None,
    typer.Option("--yarn", metavar="FACTOR", help="Read FACTOR times the model's own length."),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say more on stderr.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Nothing on stderr but errors.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be done, do nothing.")]
Copy = Annotated[bool, typer.Option("--copy", help="Copy the weights, do not link them.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")]


def shown_dry(console: Console, plan: Plan, dry_run: bool) -> bool:
    """Shows the plan where it was all that was asked for."""
    if dry_run:
        console.result(f"{plan.text()}\ndry run: nothing was written", plan.data())
    return dry_run


def number(text: str | None) -> int | str | None:
    """The number that a flag spells, or its text for the recipe to refuse."""
    try:
        return None if text is None else int(text)
    except ValueError:
        return text


def split_words(
    words: list[str] | None, *names: str, required: int = 0
) -> tuple[list[str | None], list[str]]:
    """Tells positional arguments from `key.sub=value` words, wherever they stand.

    Args:
        words: what the user wrote after the verb.
        names: the positional arguments in order, for messages ("MODEL", "OUT").
        required: how many of them must be there.

    Returns:
        One value (or None) per name, and the words for `load_recipe`.
    """
    from sparsek_cli.recipes.load import WORD

    overrides = [word for word in words or [] if WORD.match(word)]
    given = [word for word in words or [] if not WORD.match(word)]
    if len(given) > len(names):
        extra = given[len(names)]
        takes = " and ".join(names) or "no argument"
        raise UsageError(
            f"unexpected argument '{extra}'", hint=f"this verb takes {takes}, then key=value words"
        )
    if len(given) < required:
        raise UsageError(f"{names[len(given)]} is missing", hint="add --help to see the usage")
    return [*given, *[None] * (len(names) - len(given))], overrides
