"""Whether a checkpoint of a run is whole, and what is said where it is not."""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from sparsek_cli.checkpoint_files.shards import read_shard
from sparsek_cli.errors import SparsekError, reason

STATE = "trainer_state.json"
_WHAT = "a run goes on from whole files alone: put a copy in its place, or --overwrite starts over"
# Of an optimiser and its schedule; others come and go with versions of torch.
_NEEDED = {"lr", "initial_lr", "params", "betas", "weight_decay", "last_epoch", "base_lrs"}

# What transformers' Trainer computes with, by its kinds; of the rest it reads nothing here.
_STATE_KINDS: dict[str, tuple[type, ...]] = {
    "train_batch_size": (int,),
    "total_flos": (int, float),
    "stateful_callbacks": (dict,),
    "best_model_checkpoint": (str, type(None)),
}


class CannotResume(SparsekError):
    """A checkpoint that a run cannot go on from."""

    def __init__(self, message: str, *, hint: str = _WHAT):
        super().__init__(message, hint=hint)


def damaged(file: Path, why: str) -> CannotResume:
    """What to raise of a file that is there, and not what a run wrote."""
    return CannotResume(f"{file} is damaged: {why}")


@contextlib.contextmanager
def reading(file: Path) -> Iterator[None]:
    """Whatever fails in the block is the file's fault.

    Raises:
        CannotResume: it is missing, or not what a run wrote.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise CannotResume(f"{file} is missing") from error
    except torch.OutOfMemoryError:
        raise
    except (
        SafetensorError, ValueError, KeyError, TypeError, IndexError, AttributeError, RuntimeError,
    ) as error:  # fmt: skip
        raise damaged(file, reason(error)) from error


def check_checkpoint(folder: Path) -> None:
    """Raises CannotResume where a checkpoint lacks a file, or one is cut short or no JSON.

    Args:
        folder: `checkpoint-<steps>`.
    """
    state = read_json(folder / STATE)
    steps, history = state.get("global_step"), state.get("log_history")
    if steps != int(folder.name.rpartition("-")[2]) or type(steps) is not int:
        raise damaged(folder / STATE, f"it is of step {str(steps)[:40]}")
    if type(state.get("max_steps")) is not int or state["max_steps"] < steps:
        raise damaged(folder / STATE, f"its run has {str(state.get('max_steps'))[:40]} steps")
    if not isinstance(history, list) or not all(isinstance(entry, dict) for entry in history):
        raise damaged(folder / STATE, "it has no history")
    for key, kinds in _STATE_KINDS.items():
        if type(state.get(key)) not in kinds:
            raise damaged(folder / STATE, f"its {key} is {str(state.get(key))[:40]!r}")
    files = [folder / "trained.safetensors"]
    if not any(folder.glob("global_step*")):  # of DeepSpeed, which keeps its own format
        read_json(folder / "optimizer.json")
        files.append(folder / "optimizer.safetensors")
    for file in files:
        try:
            with reading(file):
                read_shard(file)
        except SparsekError as error:
            raise CannotResume(error.message) from error


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CannotResume: it is none, or is missing.
    """
    with reading(file):
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except RecursionError as error:
            raise damaged(file, "its values lie within each other too deeply") from error
        if not isinstance(found, dict):
            raise damaged(file, "it holds no JSON object")
        return found


def check_tensors(
    file: Path, tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, torch.Size]
) -> None:
    """Raises CannotResume where tensors are of other shapes, or no numbers.

    Args:
        shapes: that each must have; of those that are left out any will do.
    """
    for name, tensor in tensors.items():
        if name in shapes and tensor.shape != shapes[name]:
            raise damaged(
                file, f"{name} has shape {list(tensor.shape)}, and {list(shapes[name])} in the run"
            )
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise damaged(file, f"{name} holds values that are not finite")


def check_like(file: Path, what: str, found: Any, own: Any) -> None:
    """Raises CannotResume where settings lack keys of the run's, or have values of other kinds.

    Numbers may be of either kind, and finite; what is None on one side may be anything.
    """
    if isinstance(own, dict):
        if not isinstance(found, dict) or not own.keys() & _NEEDED <= found.keys():
            raise damaged(file, f"its {what} is not that of this run")
        for key in own.keys() & found.keys():
            check_like(file, f"{what}.{key}", found[key], own[key])
    elif isinstance(own, list | tuple):
        if not isinstance(found, list | tuple) or len(found) != len(own):
            raise damaged(file, f"its {what} is not that of this run")
        for one, other in zip(found, own, strict=True):
            check_like(file, what, one, other)
    elif own is not None and found is not None:
        numbers = type(own) in (int, float) and type(found) in (int, float)
        if (numbers and not math.isfinite(found)) or not (numbers or type(found) is type(own)):
            raise damaged(file, f"its {what} is {str(found)[:40]!r}")
