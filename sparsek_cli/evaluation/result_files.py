"""Files of a result folder by their names, and what is read of them again."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sparsek_cli.errors import UsageError
from sparsek_cli.evaluation.report.stored_shapes import is_report, is_sample, is_unit
from sparsek_cli.plain_files import check_plain

RUNS = Path("runs") / "evaluate"  # holds the results that no --out names
RESULTS = "results.json"
RUN = "run.json"


def folder_name(parts: Iterable[object]) -> str:
    """Parts joined into one readable folder name."""
    words = [re.sub(r"[^\w.+=-]+", "-", str(part)).strip("-") for part in parts if part]
    return "_".join(words)[:120]


def _name(policy: str) -> str:
    """A policy's folder; not every file system takes a colon."""
    return policy.replace(":", "-")


def unit_file(folder: Path, policy: str, unit: str) -> Path:
    """Metrics and proof of one task and length under a policy."""
    return folder / "units" / _name(policy) / f"{unit}.json"


def samples_file(folder: Path, policy: str, unit: str) -> Path:
    """The samples behind `unit_file`, one a line."""
    return folder / "samples" / _name(policy) / f"{unit}.jsonl"


def load_samples(folder: Path, policy: str, unit: str) -> list[dict[str, Any]]:
    """The stored samples of one unit; [] when they are not there or not whole."""
    try:
        # Bytes: text has letters, too, that would end lines (U+2028).
        lines = samples_file(folder, policy, unit).read_bytes().splitlines()
        found = [json.loads(line) for line in lines]
    except (OSError, ValueError, RecursionError):
        return []
    return found if all(map(is_sample, found)) else []


def load_unit(folder: Path, policy: str, unit: str) -> dict[str, Any] | None:
    """The stored result of one unit, or None when it is not there or not whole."""
    try:
        found = json.loads(unit_file(folder, policy, unit).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if is_unit(found) else None


def load_results(folder: str | Path) -> dict[str, Any]:
    """results.json of a result folder.

    Raises:
        UsageError: there is none, or it holds something else.
    """
    file = Path(folder) / RESULTS
    check_plain(file, hint="name a folder written by `sparsek evaluate`")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"no {RESULTS} in '{folder}'", hint="name a folder written by `sparsek evaluate`"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file} is not valid JSON", hint="evaluate again") from error
    if not is_report(found):
        raise UsageError(
            f"{file} holds no results of `sparsek evaluate`, or is damaged", hint="evaluate again"
        )
    return found
