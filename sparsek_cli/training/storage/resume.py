"""Resuming: runs in progress live in `OUT.part` until the finished model takes the name OUT."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from sparsek_cli.checkpoint_files import json_text
from sparsek_cli.checkpoint_files.weights_beside import listed
from sparsek_cli.devices import is_first
from sparsek_cli.errors import UsageError
from sparsek_cli.output.contents import MODEL, RUN, RUN_INPUTS, Contents
from sparsek_cli.output.contents import RUN_RECIPE as RECIPE
from sparsek_cli.output.leftovers import held
from sparsek_cli.output.place import check_folder
from sparsek_cli.training.storage.checkpoints import checkpoints_in
from sparsek_cli.training.storage.damage import check_checkpoint
from sparsek_cli.training.storage.inputs import check_inputs

# What may differ between a run and its continuation: none of it changes a step.
_FREE = ("save_steps", "log_steps", "report_to", "data_workers", "device",
         "out", "overwrite", "compile", "checkpointing", "minutes",
         "launch")  # fmt: skip


def part_folder(output: Path) -> Path:
    """Where a run lives until it is finished."""
    return output.with_name(output.name + ".part")


def check_output(
    output: Path,
    *,
    resume: bool,
    overwrite: bool,
    model: Path | None = None,
    contents: Contents = MODEL,
) -> None:
    """Raises UsageError where a run would destroy something, or has nothing to continue.

    Args:
        contents: what will lie in OUT.
        model: the folder that is trained, if it is one.
    """
    check_folder(output, contents, overwrite=overwrite, model=model)
    part = part_folder(output)
    try:
        check_folder(part, RUN, overwrite=True, model=model)
    except UsageError as error:
        raise UsageError(
            f"a run lives in OUT.part until it is finished: {error.message.removeprefix('OUT ')}",
            hint="move that away, or name another folder as OUT",
        ) from error
    unfinished = checkpoints_in(part)
    if resume and not unfinished:
        raise UsageError(
            f"nothing to resume: {part} holds no checkpoint",
            hint="start without --resume, and set save_steps to have checkpoints",
        )
    if unfinished and not resume and not overwrite:
        raise UsageError(
            f"an unfinished run is in {part}",
            hint="--resume continues it, --overwrite starts over",
        )


def checkpoint_to_resume(recipe: dict[str, Any], inputs: dict[str, str], part: Path) -> Path:
    """The newest checkpoint of a run of the same recipe, given as plain data.

    Args:
        inputs: of `inputs_of`.

    Raises:
        UsageError: the recipe, the text or the model differs in something that changes the result.
        SparsekError: the checkpoint is damaged.
    """
    try:
        before = yaml.safe_load((part / RECIPE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        before = None
    if not isinstance(before, dict):
        raise UsageError(
            f"the recipe of the unfinished run, {part / RECIPE}, cannot be read",
            hint="--overwrite starts over",
        )
    for key, now in recipe.items():
        if key not in _FREE and before.get(key) != now:
            raise UsageError(
                f"the unfinished run has {key} {before.get(key)!r}, now it is {now!r}",
                hint="resume with the same recipe, or --overwrite to start over",
            )
    kinds = {str(run["launch"]["strategy"]).startswith("zero") for run in (before, recipe)}
    if len(kinds) == 2:
        raise UsageError(
            "checkpoints of DeepSpeed and those of ddp and fsdp are different things",
            hint=f"continue with launch.strategy={before['launch']['strategy']}",
        )
    check_inputs(part, inputs)
    newest = checkpoints_in(part)[-1]
    check_checkpoint(newest)
    return newest


@contextmanager
def begun(
    recipe: dict[str, Any], inputs: dict[str, str], part: Path, *, resume: bool
) -> Iterator[None]:
    """Makes the folder and holds it, on the first process; an earlier run goes unless resumed.

    Raises:
        UsageError: another run that is alive writes there.
    """
    if not is_first():
        yield
        return
    part.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(held(part))
        except BlockingIOError as error:
            raise UsageError(
                f"another run is writing in {part}", hint="wait for it, or name another OUT"
            ) from error
        if not resume:
            _empty(part)
        text = yaml.safe_dump(recipe, sort_keys=False)
        # In one step: other processes may be reading what an earlier run left. And first: by this
        # name the folder of a run that is killed now is known.
        fresh = part / f"{RECIPE}.new"
        fresh.write_text(text, encoding="utf-8")
        json_text.write(part / RUN_INPUTS, inputs)
        fresh.replace(part / RECIPE)
        yield


def _empty(part: Path) -> None:
    """The folder itself stays: it is locked; and so does what others laid into it meanwhile.

    The recipe goes last: killed on the way, the folder is still known by it.
    """
    marks = [name for group in RUN.marks for name in group]
    for entry in sorted(part.iterdir(), key=lambda entry: entry.name in marks):
        if entry.is_symlink():
            continue
        if entry.is_dir() and any(fnmatchcase(entry.name, name) for name in RUN.folders):
            shutil.rmtree(entry)
        elif entry.is_file() and RUN.knows(entry.name):
            entry.unlink()


def remove(part: Path) -> str | None:
    """After a run, on the first process: nothing of it stays, and nothing of others goes.

    Returns:
        What is still there and why, in words; None: the folder is gone.
    """
    try:
        _empty(part)
        left = sorted(entry.name for entry in part.iterdir())
        if left:
            return f"{part} stays: it holds {listed(left)}, which this run did not write"
        part.rmdir()
    except OSError as error:
        return f"{part} stays: {error.strerror or error}"
    return None


def leave(part: Path) -> str | None:
    """After a failure, on the first process: only what can be resumed stays.

    Returns:
        What stays, in words; None: nothing.
    """
    kept = checkpoints_in(part)
    if not kept:
        return remove(part)
    shutil.rmtree(part / "writing", ignore_errors=True)
    return f"{kept[-1]} is kept, --resume continues from it"
