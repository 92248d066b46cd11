"""The result folder: one file per finished piece of work, every write all or nothing.

results.json              everything below in one file, plus settings and versions
units/<policy>/<unit>.json    metrics and proof of one task, length and policy
samples/<policy>/<unit>.jsonl every prompt's end, answer and score
loss_by_position.png .svg, report.md, report.html

Results that take the place of others are measured in OUT.part, which is called OUT when they are
whole: until then the old ones stand.
"""

import json
import os
import shutil
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sparsek_cli.disk import HALF_WRITTEN, write_atomically
from sparsek_cli.errors import SparsekError, UsageError
from sparsek_cli.evaluation.json_values import to_json
from sparsek_cli.evaluation.other_settings import differences
from sparsek_cli.evaluation.result_files import RUN, samples_file, unit_file
from sparsek_cli.output.contents import RESULTS as RESULTS_FOLDER
from sparsek_cli.output.leftovers import held
from sparsek_cli.output.place import absolute, check_folder
from sparsek_cli.output.staging import take_name

_REPLACES = "replaces"  # in run.json of OUT.part: the name of OUT
_REPLACED = "replaced"  # in run.json of results that are about to be: the name of OUT


def check_results(folder: Path, *, resume: bool, model: Path | None = None) -> None:
    """Raises UsageError where results may not be written; what is removed must be ours.

    Args:
        folder: where they go.
        resume: nothing is removed, so that other files may lie beside the results.
        model: the folder of what is measured.
    """
    if not (resume and folder.is_dir() and RESULTS_FOLDER.lacks(folder) is None):
        check_folder(folder, RESULTS_FOLDER, overwrite=True, model=model)
    # Others call files so, too: only what we wrote is written over.
    if os.path.lexists(folder / RUN) and _fingerprint_in(folder) is None:
        raise UsageError(
            f"'{folder / RUN}' was not written by `sparsek evaluate` and is not replaced",
            hint="name another --out",
        )


def check_part(folder: Path) -> None:
    """Raises UsageError where OUT.part, in which results are measured anew, is something else.

    A folder of results may be called so, too: ours says in its run.json what it will replace.
    """
    part = part_folder(folder)
    if not os.path.lexists(part) or _is_left(part, folder):
        return
    if _run_in(part).get(_REPLACES) != absolute(folder).name:
        raise UsageError(
            f"'{part}' is not of a run that was to replace '{folder}'",
            hint="move it away, or name another --out",
        )
    check_folder(part, RESULTS_FOLDER, overwrite=True)


def _is_left(part: Path, folder: Path) -> bool:
    """Whether OUT.part is what a kill leaves: nothing yet, or the results that were replaced."""
    if part.is_symlink() or not part.is_dir():
        return False
    if _run_in(part).get(_REPLACED) == absolute(folder).name:
        return RESULTS_FOLDER.foreign(part) is None
    return all(
        HALF_WRITTEN.fullmatch(entry.name) and entry.name.startswith(f".{RUN}.")
        for entry in part.iterdir()
    )


def part_folder(folder: Path) -> Path:
    """Where results are measured that will replace those in `folder`."""
    folder = absolute(folder)
    return folder.with_name(f"{folder.name}.part")


def working_folder(folder: Path, fingerprint: str) -> Path:
    """Where a run of this fingerprint has begun: `folder`, or the one beside it."""
    part = part_folder(folder)
    run = {"fingerprint": fingerprint, _REPLACES: absolute(folder).name}
    return part if _run_in(part) == run else folder


class Store:
    """One run's folder, held against other processes until its block is left.

    Attributes:
        out: the result folder.
        folder: where results are written; `out`, or OUT.part where they replace others.

    Args:
        folder: the result folder; made here.
        fingerprint: of everything that the numbers depend on.
        settings: these, to say in what results that are there differ; {}: not said.
        resume: keep what is finished there.
        overwrite: replace what is there, of this run or another.

    Raises:
        UsageError: results would be lost that nobody gave up, the folder is of something else, or
            another run is writing there.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: str,
        settings: dict[str, Any],
        *,
        resume: bool,
        overwrite: bool,
    ):
        self.out = self.folder = folder
        self._fingerprint, self._settings = fingerprint, settings
        check_results(folder, resume=resume)
        with ExitStack() as stack:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(held(folder))
                self._begin(resume=resume, overwrite=overwrite)
                if self.folder != folder:
                    stack.enter_context(held(self.folder))
                _remove_half_written(self.folder)
            except BlockingIOError as error:
                raise UsageError(
                    f"another run is writing in {folder}",
                    hint="wait for it, or name another --out",
                ) from error
            except OSError as error:
                raise SparsekError(
                    f"cannot write to {folder}: {error.strerror}", hint="name another --out"
                ) from error
            self._held = stack.pop_all()

    def _begin(self, *, resume: bool, overwrite: bool) -> None:
        folder, fingerprint = self.out, self._fingerprint
        before = _fingerprint_in(folder)
        if self._goes_on_in_part(before, resume=resume, overwrite=overwrite):
            return
        finished = len(list((folder / "units").glob("*/*.json")))
        if finished and before != fingerprint and not overwrite:
            raise UsageError(
                f"{folder} holds results of {differences(folder, self._settings)}",
                hint="name another --out, or --overwrite to replace them",
            )
        if finished and before == fingerprint and not (resume or overwrite):
            raise UsageError(
                f"{folder} holds {finished} results of this very run",
                hint="--resume keeps them and goes on, --overwrite measures them again",
            )
        anew = before is not None and (not resume or before != fingerprint)
        if anew:
            check_results(folder, resume=False)
        run = {"fingerprint": fingerprint}
        if anew and finished:
            self.folder = part_folder(folder)
            self.folder.mkdir()
            run[_REPLACES] = absolute(folder).name
        elif anew:
            for name in ("units", "samples"):
                if (folder / name).is_dir():
                    shutil.rmtree(folder / name)
        write_atomically(self.folder / RUN, to_json(run))

    def _goes_on_in_part(self, before: str | None, *, resume: bool, overwrite: bool) -> bool:
        """Whether an earlier run, which was to replace the results, is continued.

        Args:
            before: the fingerprint of what lies in OUT.

        Raises:
            UsageError: there is one, and nobody said what becomes of it; or others' files.
        """
        part = part_folder(self.out)
        if _is_left(part, self.out):
            shutil.rmtree(part)
        if _run_in(part).get(_REPLACES) != absolute(self.out).name:
            if overwrite:
                check_part(self.out)
            return False
        if resume and _fingerprint_in(part) == self._fingerprint:
            check_part(self.out)
            check_folder(self.out, RESULTS_FOLDER, overwrite=True)  # it is to be replaced
            self.folder = part
            return True
        if resume and before == self._fingerprint:
            return False
        if _has_units(part) and not overwrite:
            raise UsageError(
                f"a run that was to replace {self.out} is unfinished, in {part}",
                hint="--resume continues it with the settings it has, --overwrite starts over; "
                "or move it away",
            )
        check_part(self.out)
        shutil.rmtree(part)
        return False

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *error: object) -> None:
        """Lets other processes write into the folder; a part in which nothing is finished goes."""
        if not self.resumable():
            shutil.rmtree(self.folder, ignore_errors=True)
        self._held.close()

    def resumable(self) -> bool:
        """Whether what is there is kept for --resume: not a part in which nothing is finished."""
        return self.folder == self.out or _has_units(self.folder)

    def complete(self) -> None:
        """Results that replace others take their name.

        Raises:
            SparsekError: files of others lie there by now; both folders stay.
        """
        if self.folder == self.out:
            return
        if before := _run_in(self.out):  # killed once the names are exchanged, it is known by this
            name = absolute(self.out).name
            write_atomically(self.out / RUN, to_json(before | {_REPLACED: name}))
        if not take_name(self.folder, absolute(self.out), RESULTS_FOLDER, overwrite=True):
            raise SparsekError(
                f"{self.out} holds files of others by now and is left as it was: the new results "
                f"are in {self.folder}",
                hint="use them from there, or move the others away and give --resume",
            )
        self.folder = self.out
        write_atomically(self.folder / RUN, to_json({"fingerprint": self._fingerprint}))

    def save(
        self, policy: str, unit: str, result: dict[str, Any], samples: Iterable[dict[str, Any]]
    ) -> None:
        """Stores one unit: samples first, so that a stored result always has them."""
        lines = "".join(json.dumps(s, ensure_ascii=False, default=str) + "\n" for s in samples)
        write_atomically(samples_file(self.folder, policy, unit), lines)
        write_atomically(unit_file(self.folder, policy, unit), to_json(result))


def _run_in(folder: Path) -> dict[str, Any]:
    """What run.json says there; empty where it says nothing."""
    try:
        found = json.loads((folder / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _fingerprint_in(folder: Path) -> str | None:
    """The settings of the run whose results lie there; None: of no run of ours."""
    fingerprint = _run_in(folder).get("fingerprint")
    return fingerprint if isinstance(fingerprint, str) else None


def _remove_half_written(folder: Path) -> None:
    """What a killed run was writing; the folder is held, so that nobody goes on with it."""
    for place in ("", "units/*/", "samples/*/"):
        for file in folder.glob(f"{place}.*.part"):
            if HALF_WRITTEN.fullmatch(file.name) and file.is_file() and not file.is_symlink():
                file.unlink()


def _has_units(folder: Path) -> bool:
    return any((folder / "units").glob("*/*.json"))
