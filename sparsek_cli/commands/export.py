"""`sparsek export`."""

from typing import Annotated

import typer

from sparsek_cli.commands import options
from sparsek_cli.console import Console


def export(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Converted model, fine-tuned or not: a folder or hub id.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Argument(
            metavar="OUT", help="The folder to write [<name>-dense].", show_default=False
        ),
    ] = None,
    scorers: Annotated[
        bool,
        typer.Option(
            "--scorers",
            help="The scorers alone, for `sparsek merge`; OUT is a folder, or a file if it ends "
            "in .safetensors [<name>-scorers].",
        ),
    ] = False,
    copy: options.Copy = False,
    overwrite: options.Overwrite = False,
    revision: options.Revision = None,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """The way back: the plain dense model in MODEL, for any program, becomes OUT."""
    from sparsek_cli.errors import UsageError
    from sparsek_cli.scorers_alone import take_scorers
    from sparsek_cli.sharing import dense

    console = Console(as_json=as_json, quiet=quiet, verbose=verbose)
    if model is None:
        raise UsageError("MODEL is missing", hint="name a folder that `sparsek convert` wrote")
    if scorers and copy:
        raise UsageError("--scorers and --copy are both given", hint="drop one of them")
    if scorers:
        taking = take_scorers.plan(model, out, revision=revision, overwrite=overwrite)
        if not options.shown_dry(console, taking, dry_run):
            taken = take_scorers.run(taking, console)
            console.result(taken.text(), taken.data())
        return
    plan = dense.plan(model, out, revision=revision, copy=copy, overwrite=overwrite)
    if options.shown_dry(console, plan, dry_run):
        return
    done = dense.run(plan, console)
    console.result(done.text(), done.data())
