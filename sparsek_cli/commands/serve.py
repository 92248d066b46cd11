"""`sparsek serve`: a converted model behind the OpenAI API."""

from typing import Annotated

import typer

from sparsek_cli.commands import options
from sparsek_cli.console import Console
from sparsek_cli.errors import UsageError


def serve(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL -- FLAGS",
            help="Converted model: a folder or hub id; default: the last model made here. What "
            "stands after -- goes to the server.",
            show_default=False,
        ),
    ] = None,
    engine: Annotated[
        str, typer.Option("--engine", metavar="NAME", help="auto, vllm or transformers.")
    ] = "auto",
    host: Annotated[
        str, typer.Option("--host", metavar="ADDRESS", help="Where to listen.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", metavar="N", min=1, max=65535, help="Where to listen.")
    ] = 8000,
    revision: options.Revision = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            metavar="TYPE",
            help="bfloat16, float16 or float32; default: the checkpoint's.",
        ),
    ] = None,
    yarn: options.Yarn = None,
    dry_run: options.DryRun = False,
    json: options.Json = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Serve a converted model over the OpenAI API, on vLLM where its plugin is installed."""
    from sparsek_cli import hub
    from sparsek_cli.commands.last_model import name_or_default
    from sparsek_cli.serving import address
    from sparsek_cli.serving import plan as serving
    from sparsek_cli.serving.cost import DTYPES

    console = Console(as_json=json, quiet=quiet, verbose=verbose)
    given = words or []
    model = given[0] if given and not given[0].startswith("-") else None
    flags = given if model is None else given[1:]
    if flags and not flags[0].startswith("-"):
        raise UsageError(
            f"'{flags[0]}' stands after the model", hint="flags of the server come after --"
        )
    if not host.strip():
        raise UsageError(
            "--host is empty, which is every address of this machine",
            hint="name an address, 0.0.0.0 for all; in a shell, the variable may not be set",
        )
    if dtype not in (None, *DTYPES):
        raise UsageError(f"--dtype is {dtype!r}", hint=f"one of {', '.join(DTYPES)}")
    checkpoint = hub.resolve(name_or_default(model, say=console.say), revision)
    plan = serving.plan(
        checkpoint, engine=engine, host=host, port=port, dtype=dtype, yarn=yarn, flags=flags
    )
    if dry_run:
        console.result(f"{plan.text()}\ndry run: nothing was started", plan.data())
        return
    with address.taken(host, port):  # before anything is printed: a result is not taken back
        console.result(plan.text(), plan.data())
        console.say("starting; Ctrl-C ends it")
        serving.start(plan)
