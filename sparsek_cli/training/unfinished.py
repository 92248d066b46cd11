"""Runs in progress: they live in `OUT.part` until the finished model takes the name OUT."""

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from sparsek_cli.errors import UsageError
from sparsek_cli.training.checkpoints import checkpoints_in

if TYPE_CHECKING:
    from sparsek_cli.recipes.schema_finetune import FinetuneRecipe

RECIPE = "recipe.yaml"

# What may differ between a run and its continuation: none of it changes a step.
_FREE = ("save_steps", "keep_checkpoints", "log_steps", "report_to", "data_workers", "device",
         "out", "compile", "checkpointing", "loss_chunk", "minutes",
         "launch")  # fmt: skip


def part_folder(output: Path) -> Path:
    """Where a run lives until it is finished."""
    return output.with_name(output.name + ".part")


def check_output(output: Path, *, resume: bool, overwrite: bool) -> None:
    """Raises UsageError where a run would destroy something, or has nothing to continue."""
    if output.exists() and not overwrite:
        raise UsageError(
            f"'{output}' exists", hint="choose another OUT, or add --overwrite to replace it"
        )
    part = part_folder(output)
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


def checkpoint_to_resume(recipe: "FinetuneRecipe", part: Path) -> Path:
    """The newest checkpoint of a run of the same recipe.

    Raises:
        UsageError: the recipe differs in something that changes the result.
    """
    before = yaml.safe_load((part / RECIPE).read_text(encoding="utf-8"))
    now = recipe.model_dump(mode="json")
    for key in now:
        if key not in _FREE and before.get(key) != now[key]:
            raise UsageError(
                f"the unfinished run has {key} {before.get(key)!r}, now it is {now[key]!r}",
                hint="resume with the same recipe, or --overwrite to start over",
            )
    kinds = {str(run["launch"]["strategy"]).startswith("zero") for run in (before, now)}
    if len(kinds) == 2:
        raise UsageError(
            "checkpoints of DeepSpeed and those of ddp and fsdp are different things",
            hint=f"continue with launch.strategy={before['launch']['strategy']}",
        )
    return checkpoints_in(part)[-1]


def begin(recipe: "FinetuneRecipe", part: Path, *, resume: bool) -> None:
    """Makes the folder, on the first process; what an earlier run left goes unless resumed."""
    if os.environ.get("RANK", "0") != "0":
        return
    if not resume:
        shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
    # In one step: other processes may be reading what an earlier run left.
    fresh = part / f"{RECIPE}.new"
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(part / RECIPE)


def leave(part: Path) -> Path | None:
    """After a failure, on the first process: only what can be resumed stays.

    Returns:
        The checkpoint that stays, if any.
    """
    kept = checkpoints_in(part)
    if not kept:
        shutil.rmtree(part, ignore_errors=True)
        return None
    shutil.rmtree(part / "writing", ignore_errors=True)
    return kept[-1]
