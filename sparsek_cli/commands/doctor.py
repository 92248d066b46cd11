"""`sparsek doctor`: what is installed, what will run, and whether it computes what it should."""

from dataclasses import asdict
from typing import Annotated

import typer

from sparsek_cli.commands import options
from sparsek_cli.console import Console
from sparsek_cli.errors import RAN_AND_FAILED, SparsekError


def doctor(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="Check this model, too.", show_default=False),
    ] = None,
    revision: options.Revision = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Check the installation, and with MODEL a converted checkpoint; exit 1 if a check fails."""
    from sparsek_cli.diagnosis.diagnose import diagnose

    console = Console(as_json=json, quiet=quiet or json, verbose=verbose)
    checks = []
    for check in diagnose(
        model,
        revision=revision,
        device=device,
        dtype=dtype,
        say=lambda text: console.say(f"...  {text}"),
    ):
        checks.append(check)
        if not json:
            mark = {None: "    ", True: "ok  ", False: "FAIL"}[check.ok]
            console.result(f"{mark} {check.name:<18} {check.detail}", None)
            if check.ok is False and check.hint:
                console.result(f"     {'':<18} {check.hint}", None)
    failed = [check for check in checks if check.ok is False]
    if json:
        rows = [asdict(check) for check in checks]
        console.result("", {"ok": not failed, "checks": rows})
    if failed:
        raise SparsekError(
            f"{len(failed)} check{'s' if len(failed) > 1 else ''} failed: "
            + ", ".join(check.name for check in failed),
            hint=failed[0].hint,
            exit_code=RAN_AND_FAILED,
        )
