"""Where a model runs, in which number format and in how many processes, as the user says."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sparsek_cli.errors import SparsekError, UsageError, first_line

if TYPE_CHECKING:
    import torch

# What launchers set beside WORLD_SIZE.
_LAUNCHED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_MANY = 1_000_000_000
_HOW_TO_LAUNCH = "unset WORLD_SIZE, or start with `torchrun --nproc-per-node N -m sparsek_cli ...`"

PATIENCE = 120.0  # seconds until all processes of a launch must be there
_met: list[Any] = []  # the store at which they met: the others are connected to it

DTYPES = ("auto", "bfloat16", "float16", "float32")


def choose_device(name: str | None = None) -> "torch.device":
    """`auto` (or None) is the CUDA device in use, else the CPU."""
    import torch

    if name in (None, "auto"):
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(
            f"unknown device '{name}'", hint="use auto, cpu, cuda or cuda:N"
        ) from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise UsageError(
            f"device '{name}' is not there: this PyTorch sees {count} CUDA device(s)",
            hint="use --device cpu, or look with `sparsek doctor`",
        )
    if device.type == "mps":
        raise UsageError(
            "device 'mps' has no float64, in which keys are compared", hint="use --device cpu"
        )
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device '{name}' is not supported", hint="use auto, cpu or cuda")
    return device


def choose_dtype(name: str | None, device: "torch.device") -> "torch.dtype":
    """`auto` (or None) is bfloat16 on a GPU that has it, else float32."""
    import torch

    if name in (None, "auto"):
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if bf16 else torch.float32
    names = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32"}
    name = names.get(name, name)
    if name not in DTYPES:
        raise UsageError(f"unknown dtype '{name}'", hint=f"use one of {', '.join(DTYPES)}")
    return getattr(torch, name)


def is_first() -> bool:
    """Whether this process is the one that speaks and writes; RANK means nothing to one alone."""
    return world_size() == 1 or os.environ["RANK"] == "0"


def world_size() -> int:
    """Processes started by torchrun or accelerate launch; 1 without them.

    Raises:
        UsageError: the environment names several, and no launcher started this one: it would wait
            for the others for ever.
    """
    count = _number("WORLD_SIZE", "1", range(1, _MANY))
    missing = [name for name in _LAUNCHED if not os.environ.get(name)]
    if count > 1 and missing:
        raise UsageError(
            f"WORLD_SIZE is {count} in the environment, but {missing[0]} is not set: nobody "
            "started the other processes",
            hint=_HOW_TO_LAUNCH,
        )
    if count > 1:
        for name, numbers in (
            ("RANK", range(count)), ("LOCAL_RANK", range(count)), ("MASTER_PORT", range(1, 65536))
        ):  # fmt: skip
            _number(name, "", numbers)
    return count


def meet_others(say: Callable[[str], None], patience: float = PATIENCE) -> None:
    """Returns once all processes of a launch are there, at once in a process alone.

    torch's own wait is of many minutes and says nothing; it follows, and finds them all.

    Args:
        say: hears what is waited for. patience: seconds.

    Raises:
        SparsekError: they did not come.
    """
    count = world_size()
    if count == 1 or _met:
        return
    from datetime import timedelta

    import torch.distributed as distributed
    from torch.distributed.rendezvous import rendezvous

    if distributed.is_initialized():
        return
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    say(f"waiting for {count} processes at {place}, {patience:g} seconds at most")
    try:
        _met.append(next(iter(rendezvous("env://", timeout=timedelta(seconds=patience)))))
    except (distributed.DistError, RuntimeError, ValueError) as error:
        raise SparsekError(
            f"WORLD_SIZE is {count} in the environment, and the other processes did not come to "
            f"{place} within {patience:g} seconds: {first_line(error)}",
            hint=_HOW_TO_LAUNCH,
        ) from error


def forget_stray_ranks() -> None:
    """Takes out of the environment what libraries would wait for others by, in a process alone.

    A launch of a single process stays as it is.
    """
    if world_size() == 1 and not (
        os.environ.get("RANK") == os.environ.get("LOCAL_RANK") == "0"
        and all(os.environ.get(name) for name in ("WORLD_SIZE", *_LAUNCHED))
    ):
        for name in _LAUNCHED:
            os.environ.pop(name, None)


def _number(name: str, default: str, numbers: range) -> int:
    text = os.environ.get(name, default)
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) in numbers):
        which = "no number" if numbers.stop == _MANY else f"not 0 to {numbers.stop - 1}"
        raise UsageError(
            f"{name} in the environment is {text[:40]!r}, {which}", hint=_HOW_TO_LAUNCH
        )
    return int(text)
