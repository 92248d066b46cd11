"""Scorers alone: one safetensors file of megabytes that says which base it belongs to.

Tensors are named `layers.3.weight`, whatever the family calls its modules. The file's metadata
holds the `sparsek` block, what is known of the base (`base_identity`), and the small texts that lay
beside the scorers (recipe, calibration report), so that the file is enough by itself.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparsek_cli import disk, hub
from sparsek_cli.errors import SparsekError, UsageError
from sparsek_cli.file_kinds import check_plain
from sparsek_cli.output.contents import CALIBRATION, CONVERT_RECIPE, FINETUNE_RECIPE, SCORERS

FORMAT = "sparsek-scorers-1"
TEXTS = (CONVERT_RECIPE, FINETUNE_RECIPE, CALIBRATION)


@dataclass(frozen=True)
class Scorers:
    """A file of scorers, its header read.

    Attributes:
        file: where it is.
        block: the `sparsek` block of config.json.
        base: of the model they were made for: name, model_type, config, weights (a hash).
        texts: small files that came with them, by name.
    """

    file: Path
    block: dict[str, Any]
    base: dict[str, Any]
    texts: dict[str, str]

    def tensors(self) -> dict[str, np.ndarray]:
        """`layers.<number>.<part>` -> float32.

        Raises:
            SparsekError: as `check_finite`.
        """
        from safetensors.numpy import load_file

        found = load_file(self.file)
        check_finite(found, str(self.file))
        return found

    def of_layer(self, number: int, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The parts of one layer's scorer by their own names."""
        start = f"layers.{number}."
        return {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}


def check_finite(tensors: dict[str, np.ndarray], holder: str) -> None:
    """Raises SparsekError for scorers that are no numbers; they would select whatever is first."""
    for name, array in tensors.items():
        if not np.isfinite(array).all():
            raise SparsekError(
                f"the scorers in {holder} are damaged: {name} holds values that are not finite",
                hint="fetch or export them again, or convert the base again",
            )


def write(
    file: Path,
    tensors: dict[str, np.ndarray],
    block: dict[str, Any],
    base: dict[str, Any],
    texts: dict[str, str],
) -> None:
    """Writes `file` in one rename; see `Scorers` for what it holds."""
    from safetensors.numpy import save_file

    metadata = {
        "format": FORMAT,
        "sparsek": json.dumps(block),
        "base": json.dumps(base),
        "texts": json.dumps(texts),
    }
    part = file.with_name(f".{file.name}.part")
    try:
        with disk.os_errors():
            save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, part, metadata)
        disk.readable(part)
        os.replace(part, file)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def read(place: str | os.PathLike, revision: str | None = None) -> Scorers:
    """The scorers at a path or in a hub repository.

    Args:
        place: the file, a folder that holds it as `sparsek.safetensors`, or a hub id.
        revision: of a hub id.

    Raises:
        UsageError: there are none; the message says what is there instead.
        SparsekError: the hub could not be reached, or refused.
    """
    name = os.fspath(place)
    path = Path(os.path.expanduser(name))
    if not os.path.lexists(path) and hub.is_hub_id(name):
        path = hub.fetch(name, revision)
    if path.is_dir():
        if (path / "config.json").is_file():
            raise UsageError(
                f"'{name}' is a whole model, not scorers alone",
                hint="use it as it is; `sparsek export --scorers` takes the scorers out of one",
            )
        path = path / SCORERS
    check_plain(path, hint=f"name a file or folder of scorers ({SCORERS})")
    if not path.is_file():
        raise UsageError(
            f"there are no scorers at '{name}'",
            hint=f"name a file or folder that `sparsek export --scorers` wrote ({SCORERS})",
        )
    found = header(path)
    if found is None:
        raise UsageError(
            f"'{path}' holds no scorers of a base that it names",
            hint="`sparsek export --scorers MODEL OUT` writes such a file",
        )
    return found


def header(file: Path) -> Scorers | None:
    """What a file says of itself; None where it is no file of scorers."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np") as opened:
            metadata = opened.metadata() or {}
        if metadata.get("format") != FORMAT:
            return None
        block, base, texts = (json.loads(metadata[k]) for k in ("sparsek", "base", "texts"))
        known = {k: v for k, v in texts.items() if k in TEXTS and isinstance(v, str)}
        if not {"name", "model_type", "config", "weights"} <= base.keys():
            return None
        return Scorers(file, dict(block), dict(base), known)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
