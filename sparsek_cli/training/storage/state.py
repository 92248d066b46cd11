"""Optimiser, schedule and random generators of a run as safetensors and JSON: nothing pickled.

What FSDP has sharded is gathered first, so that a checkpoint fits any number of processes.
DeepSpeed keeps its own format.
"""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from sparsek_cli.training.storage.damage import (
    check_like,
    check_tensors,
    damaged,
    read_json,
    reading,
)

OPTIMIZER = "optimizer.safetensors"
SETTINGS = "optimizer.json"


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor on the CPU; every process must ask for a sharded one."""
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().cpu().contiguous()


def sharded_like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """`tensor`, or this process's part of it where `parameter` is sharded."""
    if not hasattr(parameter, "device_mesh") or tensor.shape != parameter.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements
    # Every process has read the file: nothing needs to be sent.
    return distribute_tensor(tensor.to(parameter.device), mesh, placements, src_data_rank=None)


def save_optimizer(optimizer: Any, scheduler: Any, folder: Path, *, write: bool = True) -> None:
    """Writes moments as tensors "<parameter>.<name>", everything else as JSON.

    Args:
        write: on one process; the others only take part in gathering.
    """
    state = optimizer.state_dict()
    tensors, numbers = {}, {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            if torch.is_tensor(value):
                tensors[f"{index}.{name}"] = gathered(value)
            else:
                numbers[f"{index}.{name}"] = value
    if not write:
        return
    save_file(tensors, folder / OPTIMIZER)
    rest = {
        "groups": state["param_groups"],
        "numbers": numbers,
        "tensors": sorted(tensors),
        "scheduler": scheduler.state_dict(),
    }
    (folder / SETTINGS).write_text(json.dumps(rest), encoding="utf-8")


def load_optimizer(optimizer: Any, scheduler: Any, folder: Path) -> None:
    """Puts back what `save_optimizer` wrote; tensors go to their parameters' devices.

    Raises:
        SparsekError: the files are damaged, or of another run.
    """
    settings, file = folder / SETTINGS, folder / OPTIMIZER
    rest = read_json(settings)
    with reading(file):
        tensors = load_file(file)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    with reading(settings):
        if sorted(tensors) != rest.get("tensors", sorted(tensors)):  # 0.1.0 did not count them
            raise damaged(file, "it lacks tensors, or has others")
        state = _by_parameter(file, tensors, rest["numbers"], parameters)
        own = optimizer.state_dict()["param_groups"]
        check_like(settings, "groups", rest["groups"], own)
        check_like(settings, "scheduler", rest["scheduler"], scheduler.state_dict())
        groups = rest["groups"]
        for group in groups:
            # JSON has no tuples, and AdamW's `betas` is one.
            group.update({k: tuple(v) for k, v in group.items() if k == "betas"})
        optimizer.load_state_dict({"state": state, "param_groups": groups})
        scheduler.load_state_dict(rest["scheduler"])


def _by_parameter(
    file: Path,
    tensors: dict[str, torch.Tensor],
    numbers: dict[str, Any],
    parameters: list[torch.Tensor],
) -> dict[int, dict[str, Any]]:
    """An optimiser's state by the numbers of its parameters: moments have a parameter's shape."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **numbers}.items():
        index, name = key.split(".", 1)
        parameter = parameters[int(index)]
        if torch.is_tensor(value):
            check_tensors(file, {key: value}, {key: parameter.shape} if value.dim() else {})
            value = sharded_like(value, parameter)
        state.setdefault(int(index), {})[name] = value
    return state


def save_generators(folder: Path, rank: int) -> None:
    """Writes the state of this process's random generators (Python, NumPy, PyTorch)."""
    version, numbers, cached = random.getstate()
    name, keys, position, has_gauss, gauss = np.random.get_state()
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(keys.astype(np.int64))}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    rest = {
        "python": [version, list(numbers), cached],
        "numpy": [name, position, has_gauss, gauss],
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, _generators(folder, rank), metadata={"rest": json.dumps(rest)})


def load_generators(folder: Path, rank: int) -> None:
    """Puts back what `save_generators` wrote; a process that did not exist then keeps its own.

    Raises:
        SparsekError: the file is damaged.
    """
    from safetensors import safe_open

    file = _generators(folder, rank)
    if not file.is_file():
        return
    with reading(file):
        tensors = load_file(file)
        with safe_open(file, "pt") as opened:
            rest = json.loads(opened.metadata()["rest"])
        version, numbers, cached = rest["python"]
        random.setstate((version, tuple(numbers), cached))
        name, position, has_gauss, gauss = rest["numpy"]
        keys = tensors["numpy"].numpy().astype(np.uint32)
        np.random.set_state((name, keys, position, has_gauss, gauss))
        torch.set_rng_state(tensors["torch"])
        if "cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["cuda"])


def _generators(folder: Path, rank: int) -> Path:
    return folder / f"generators-{rank}.safetensors"
