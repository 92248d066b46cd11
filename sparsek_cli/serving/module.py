"""A server's module, run in this process: whatever it fails with, the last two lines say so."""

from __future__ import annotations

import runpy
import traceback

from sparsek_cli.console import report_error
from sparsek_cli.errors import RAN_AND_FAILED, reason, refusal


def run(name: str, hint: str) -> int | None:
    """Runs module `name` as a program; the exit code of a failure, or None where it just ended.

    A refusal of ours is two lines; a failure of the server's own keeps its traceback before them.

    Args:
        hint: what to do about such a failure.
    """
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    except Exception as error:
        found = refusal(error)
        if found is None:
            traceback.print_exc()
            report_error(f"the server failed: {reason(error)}", hint)
            return RAN_AND_FAILED
        report_error(found.message, found.hint)
        return found.exit_code
    return None
