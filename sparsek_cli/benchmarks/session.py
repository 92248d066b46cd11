"""The clock and the record of a long measurement: phases that may fail or find no time left.

Everything measured is printed at once and written to `results.json` after every phase, so that a
measurement that is cut off has still told what it knew.
"""

import argparse
import gc
import json
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar

from sparsek_cli.console import set_up_logging
from sparsek_cli.disk import write_atomically
from sparsek_cli.errors import SparsekError, UsageError
from sparsek_cli.silence import no_bars

Result = TypeVar("Result")
RESULTS = "results.json"


class Session:
    """One run of an experiment or a benchmark.

    Args:
        folder: where results.json and everything made goes.
        seconds: time for all of it.
        about: what the record starts with: settings, versions, device.
        resume: settings that may differ when `folder` holds the record of an earlier run, whose
            finished phases are then not done again; None: an earlier record is forgotten.

    Raises:
        UsageError: the earlier record has other settings.
    """

    def __init__(
        self,
        folder: Path,
        seconds: float,
        about: dict[str, Any],
        resume: Collection[str] | None = None,
    ):
        self.folder = folder
        self._end = time.monotonic() + seconds
        self._start = time.monotonic()
        self.record: dict[str, Any] = {"about": about, "phases": {}, "rows": []}
        if resume is not None and (folder / RESULTS).is_file():
            self.record = _earlier(folder / RESULTS, about, resume)
        self._finished = {
            name
            for name, phase in self.record["phases"].items()
            if "seconds" in phase and "error" not in phase
        }
        folder.mkdir(parents=True, exist_ok=True)

    @classmethod
    def of(cls, given: argparse.Namespace, resume: Collection[str] | None = None) -> "Session":
        """The session that a command line asks for (see `arguments`); says where it runs."""
        quiet_libraries()
        about = {"settings": vars(given), **machine()}
        session = cls(Path(given.out), given.seconds, about, resume)
        session.say(f"{about['device']}, sparse attention: {about['sparse_backend']}")
        return session

    @property
    def left(self) -> float:
        """Seconds until the time is up; may be negative."""
        return self._end - time.monotonic()

    def say(self, text: str) -> None:
        """A line with the time since the start."""
        print(f"[{time.monotonic() - self._start:5.0f}s] {text}", flush=True)

    def run(self, name: str, work: Callable[[], Result], *, needs: float = 0.0) -> Result | None:
        """`work()`; None where it fails, was done before, or `needs` seconds are not left."""
        if name in self._finished:
            return None
        if self.left < needs:
            self.say(f"{name}: skipped, {self.left:.0f} s left of {needs:.0f} needed")
            self._note(name, {"skipped": True})
            return None
        begun = time.monotonic()
        self.say(f"--- {name}")
        try:
            result = work()
        except Exception as error:  # the next phase may well work
            hint = f" ({error.hint})" if isinstance(error, SparsekError) else ""
            self.say(f"{name}: failed: {type(error).__name__}: {error}{hint}")
            if not isinstance(error, SparsekError):
                traceback.print_exc()
            self._note(name, {"error": str(error), "seconds": time.monotonic() - begun})
            return None
        self._note(name, {"seconds": time.monotonic() - begun})
        _free_memory()
        return result

    def row(self, **fields: Any) -> None:
        """A line of the table: shown now, and kept; mappings and lists are only kept."""
        self.record["rows"].append(fields)
        simple = [
            f"{key} {shown(value)}"
            for key, value in fields.items()
            if value is not None and not isinstance(value, dict | list)
        ]
        self.say("=> " + "  ".join(simple))
        self._write()

    def table(self, columns: Sequence[str], rows: Sequence[dict[str, Any]] | None = None) -> str:
        """All rows, or `rows`, under `columns`; what a row lacks is left empty."""
        rows = self.record["rows"] if rows is None else rows
        cells = [[shown(row.get(name)) for name in columns] for row in rows]
        widths = [
            max(len(name), *(len(line[i]) for line in cells), 0) for i, name in enumerate(columns)
        ]
        lines = [columns, ["-" * width for width in widths], *cells]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )

    def _note(self, name: str, fields: dict[str, Any]) -> None:
        self.record["phases"][name] = {
            key: round(value, 1) if isinstance(value, float) else value
            for key, value in fields.items()
        }
        self._write()

    def _write(self) -> None:
        write_atomically(self.folder / RESULTS, json.dumps(self.record, indent=1) + "\n")


def _earlier(file: Path, about: dict[str, Any], free: Collection[str]) -> dict[str, Any]:
    """The record of an earlier run with the same settings but for those in `free`."""
    record = json.loads(file.read_text(encoding="utf-8"))
    before, now = record["about"]["settings"], json.loads(json.dumps(about["settings"]))
    for key in now:
        if key not in free and before.get(key) != now[key]:
            raise UsageError(
                f"{file.parent} holds results with {key} {before.get(key)!r}, now it is "
                f"{now[key]!r}",
                hint="choose another folder, or the same settings to go on",
            )
    return {**record, "about": about}


def _free_memory() -> None:
    """What the last phase held on the GPU goes back, models and optimisers in cycles too."""
    import torch

    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def arguments(
    module: str, doc: str | None, *, seconds: float, smoke: bool = True
) -> argparse.ArgumentParser:
    """A parser with what every experiment takes: OUT, --seconds, --device and --smoke."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", help="folder for results.json and everything that is made")
    parser.add_argument("--seconds", type=float, default=seconds, help="time for all of it")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    if smoke:
        parser.add_argument("--smoke", action="store_true", help="toy sizes, to see that it runs")
    return parser


def quiet_libraries() -> None:
    """No bars and no warnings of other libraries between our lines."""
    set_up_logging()
    no_bars()


def shown(value: Any) -> str:
    """A value as a table shows it."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def machine() -> dict[str, Any]:
    """Device, versions and attention backend of this process."""
    import torch
    import transformers
    from sparsek_kernels import dispatch

    backend = dispatch.describe()
    return {
        "device": backend["device"],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "triton": backend["triton"],
        "sparse_backend": f"{backend['backend']} ({backend['reason']})",
    }
