"""`sparsek push`."""

from typing import Annotated

import typer

from sparsek_cli.commands import options
from sparsek_cli.console import Console


def push(
    folder: Annotated[
        str | None,
        typer.Argument(
            metavar="FOLDER",
            help="A folder that sparsek wrote: model, adapters or scorers.",
            show_default=False,
        ),
    ] = None,
    repo: Annotated[
        str | None,
        typer.Argument(metavar="REPO", help="Where to, as owner/name.", show_default=False),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Make a new repository public; it is private else.")
    ] = False,
    licence: Annotated[
        str | None,
        typer.Option("--licence", "--license", metavar="ID", help="Of the weights [the base's]."),
    ] = None,
    evaluation: Annotated[
        str | None,
        typer.Option(
            "--evaluation",
            metavar="RESULTS",
            help="Results of `sparsek evaluate FOLDER`, for the card.",
        ),
    ] = None,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Send FOLDER to the Hugging Face hub with a card: licence, base, and what was measured."""
    from sparsek_cli.errors import UsageError
    from sparsek_cli.sharing import push as pushing

    console = Console(as_json=as_json, quiet=quiet, verbose=verbose)
    if folder is None or repo is None:
        raise UsageError(
            f"{'FOLDER' if folder is None else 'REPO'} is missing",
            hint="`sparsek push FOLDER owner/name`",
        )
    plan = pushing.plan(
        folder, repo, public=public, licence=licence, evaluation=evaluation, reporter=console
    )
    if dry_run:
        console.result(f"{plan.text()}\n\ndry run: nothing was sent", plan.data())
        return
    done = pushing.run(plan, console)
    console.result(done.text(), done.data())
