"""`sparsek merge`."""

from shlex import quote
from typing import Annotated

import typer

from sparsek_cli.commands import options
from sparsek_cli.console import Console


def merge(
    base: Annotated[
        str | None,
        typer.Argument(
            metavar="BASE",
            help="The dense model they were made for: folder, hub id or short name.",
            show_default=False,
        ),
    ] = None,
    scorers: Annotated[
        str | None,
        typer.Argument(
            metavar="SCORERS",
            help="Scorers alone: a file, a folder or a hub id.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Argument(
            metavar="OUT", help="The folder to write [<name>-sparsek].", show_default=False
        ),
    ] = None,
    copy: options.Copy = False,
    overwrite: options.Overwrite = False,
    revision: options.Revision = None,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Put scorers onto the base they were made for: BASE and SCORERS become OUT."""
    from sparsek_cli.commands import last_model
    from sparsek_cli.errors import UsageError
    from sparsek_cli.sharing import merge as merging

    console = Console(as_json=as_json, quiet=quiet, verbose=verbose)
    if base is None or scorers is None:
        raise UsageError(
            f"{'BASE' if base is None else 'SCORERS'} is missing",
            hint="`sparsek merge BASE SCORERS OUT`",
        )
    plan = merging.plan(base, scorers, out, revision=revision, copy=copy, overwrite=overwrite)
    if options.shown_dry(console, plan, dry_run):
        return
    done = merging.run(plan, console)
    last_model.remember(done.out)
    console.result(done.text(), done.data())
    console.say(f"\nnext: sparsek chat {quote(str(done.out))}")
