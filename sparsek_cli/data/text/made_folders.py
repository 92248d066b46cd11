"""Folders within a folder of text that programs made: models, adapters, results, unfinished runs.

Their cards, samples and vocabularies end as text does. Where OUT lies in the folder that is read,
the next run would learn from what this one wrote.
"""

from collections.abc import Iterable
from functools import cache
from pathlib import Path

from sparsek_cli.output.contents import RESULTS, RUN, SCORERS

_ADAPTER = "adapter_config.json"


def without_made(files: Iterable[Path], folder: Path) -> tuple[list[Path], list[Path]]:
    """Files below a folder that lie in none that a program made, and those that do lie in one.

    The folder itself may be one: who names it means what it holds.

    Returns:
        The files that stay, and the made folders that others are in, each once.
    """
    is_made = cache(_is_made)
    stay, made = [], {}
    for file in files:
        between = [p for p in file.parents if p != folder and p.is_relative_to(folder)]
        holder = next((p for p in reversed(between) if is_made(p)), None)
        if holder is None:
            stay.append(file)
        else:
            made[holder] = None
    return stay, list(made)


def say_made(folder: Path, made: list[Path]) -> str:
    """What is left out of a folder of text, and why."""
    more = f" and {len(made) - 3} more" if made[3:] else ""
    named = ", ".join(f"'{p.relative_to(folder)}'" for p in made[:3])
    return (
        f"'{folder}': models, results and unfinished runs are no text and not read: {named}{more}"
    )


def _is_made(folder: Path) -> bool:
    if any((folder / name).is_file() for name in (SCORERS, _ADAPTER)):
        return True
    if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        return True
    if folder.name.endswith(".part") and RUN.lacks(folder) is None:
        return True
    return RESULTS.lacks(folder) is None and (folder / "units").is_dir()
