"""A server's module, run in this process: what it refuses is two lines and no traceback."""

from __future__ import annotations

import runpy

from sparsek_cli.console import report_error
from sparsek_cli.errors import refusal


def run(name: str) -> int | None:
    """Runs module `name` as a program; the exit code of a refusal, or None where it just ended."""
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    except Exception as error:
        found = refusal(error)
        if found is None:
            raise
        report_error(found.message, found.hint)
        return found.exit_code
    return None
