"""The `sparsek` command: verbs, global flags, and the one place where errors become messages."""

import sys
from typing import Annotated

import typer

from sparsek_cli import __version__
from sparsek_cli.commands import bench, chat, convert, doctor, evaluate, finetune, recipes
from sparsek_cli.errors import INTERRUPTED, RAN_AND_FAILED, SparsekError

app = typer.Typer(
    name="sparsek",
    help="Convert, fine-tune, evaluate and chat with language models under SparseK attention.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"sparsek {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Linear-time attention and a constant-size KV cache for the models you already have."""


app.command("convert")(convert.convert)
app.command("finetune")(finetune.finetune)
app.command("evaluate")(evaluate.evaluate)
app.command("eval", hidden=True)(evaluate.evaluate)
app.command("chat")(chat.chat)
app.command("bench")(bench.bench)
app.command("doctor")(doctor.doctor)
app.add_typer(recipes.app, name="recipes")


def main() -> None:
    """Console entry point: runs a verb and turns failures into `error:` / `hint:` lines."""
    try:
        app()
    except KeyboardInterrupt:
        _stop("interrupted", "", INTERRUPTED)
    except SparsekError as error:
        if "--debug" in sys.argv:
            raise
        _stop(error.message, error.hint, error.exit_code)
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        message = f"{type(error).__name__}: {error}".splitlines()[0]
        _stop(message, "run again with `sparsek --debug ...` to see where", RAN_AND_FAILED)


def _stop(message: str, hint: str, exit_code: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)
    sys.exit(exit_code)


if __name__ == "__main__":
    main()
