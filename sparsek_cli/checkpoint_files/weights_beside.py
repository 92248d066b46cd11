"""Files of weights in a model's folder, and which of them a verb leaves out.

A folder may hold the same model several times, or several models. What is read is one of them: who
named the folder hears of the others, since the one that was meant may be among them.
"""

from collections.abc import Iterable
from pathlib import Path

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_WEIGHTS = (".safetensors", ".gguf", *PICKLES, ".h5", ".msgpack", ".ot")
# What trainers leave beside weights.
_STATES = (
    "training_args",
    "optimizer",
    "scheduler",
    "scaler",
    "rng_state",
    "random_states",
    "ema_",
)
_NAMED = 3


def weight_files(folder: Path) -> list[Path]:
    """The files of weights at the top of a folder, by name; a trainer's own state is none."""
    return sorted(
        file
        for file in folder.iterdir()
        if file.suffix.lower() in _WEIGHTS and not file.name.startswith(_STATES) and file.is_file()
    )


def left_out(folder: Path, read: Iterable[Path]) -> str | None:
    """What is read of a folder's weights and what is not, in words; None where all are.

    Args:
        folder: a checkpoint. read: the files that count.
    """
    taken = sorted({file.name for file in read})
    others = [file.name for file in weight_files(folder) if file.name not in taken]
    if not others:
        return None
    return f"of the weights in '{folder}' {listed(taken)} is read, and {listed(others)} is not"


def listed(names: list[str]) -> str:
    """The first names, and how many more there are."""
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
