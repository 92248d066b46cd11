"""Checkpoints of a run: written beside, renamed, and holding only what learns."""

import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from sparsek_cli import disk
from sparsek_cli.errors import SparsekError
from sparsek_cli.training.parameters import changing_parameters
from sparsek_cli.training.storage.damage import CannotResume, check_tensors, read_json, reading
from sparsek_cli.training.storage.state import sharded_like

WEIGHTS = "trained.safetensors"
LOSS = "loss.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoints_in(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first; a checkpoint has its name only once it is complete."""
    if not folder.is_dir():
        return []
    found = [(int(m[1]), p) for p in folder.iterdir() if (m := _NAME.fullmatch(p.name))]
    return [path for _, path in sorted(found)]


def save_trained(model: torch.nn.Module, folder: Path, state: dict[str, Any] | None) -> None:
    """Writes the parameters that the run changes.

    Args:
        state: full state dict gathered by FSDP or DeepSpeed; None: read from `model`.
    """
    names = [*changing_parameters(model)]
    own = dict(model.named_parameters()) if state is None else state
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: own[name].detach().cpu().contiguous() for name in names}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def load_trained(model: torch.nn.Module, folder: Path) -> None:
    """Puts back what `save_trained` wrote.

    Raises:
        CannotResume: the checkpoint belongs to other parameters, or is damaged.
    """
    with reading(folder / WEIGHTS):
        tensors = load_file(folder / WEIGHTS)
    own = changing_parameters(model)
    if tensors.keys() != own.keys():
        odd = sorted(tensors.keys() ^ own.keys())[0]
        raise CannotResume(
            f"{folder} does not fit this recipe: parameter {odd} is on one side only",
            hint="resume with the recipe the run was started with, or start over",
        )
    check_tensors(folder / WEIGHTS, tensors, {name: p.shape for name, p in own.items()})
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(sharded_like(tensor, own[name]))


def save_loss(loss: float, folder: Path) -> None:
    """Writes the training loss of the step that the checkpoint follows."""
    (folder / LOSS).write_text(json.dumps({"loss": loss}), encoding="utf-8")


def load_loss(folder: Path) -> float:
    """What `save_loss` wrote; NaN where an older version did not."""
    file = folder / LOSS
    if not file.is_file():
        return math.nan
    with reading(file):
        return float(read_json(file)["loss"])


def keep_newest(folder: Path, count: int) -> None:
    """Deletes all but the newest `count` checkpoints."""
    for old in checkpoints_in(folder)[:-count]:
        # Renamed first, so that a kill in the middle leaves nothing that looks complete.
        doomed = old.with_name(f"old-{old.name}")
        old.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def disk_error(error: OSError, folder: Path) -> SparsekError:
    """What to tell when saving failed; earlier checkpoints are untouched."""
    kept = checkpoints_in(folder)
    after = f"; {kept[-1].name} is kept" if kept else ""
    go_on = "then continue with --resume" if kept else "then start again"
    if disk.is_full(error):
        return SparsekError(
            f"the disk is full while saving a checkpoint in {folder}{after}",
            hint=f"free some space, {go_on}",
        )
    return SparsekError(
        f"cannot save a checkpoint in {folder}: {os.strerror(error.errno or 0)}{after}",
        hint=f"check permissions, {go_on}",
    )
