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

from sparsek_cli import disk
from sparsek_cli.checkpoint_files.seal import check_seal, seal
from sparsek_cli.errors import SparsekError
from sparsek_cli.output.contents import CALIBRATION, CONVERT_RECIPE, FINETUNE_RECIPE

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
            SparsekError: they are damaged, see `check_seal` and `check_finite`.
        """
        from safetensors.numpy import load_file

        check_seal(self.file)
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
    *,
    overwrite: bool = True,
) -> None:
    """Writes `file` in one step; see `Scorers` for what it holds.

    Args:
        overwrite: replace one that is there by now.

    Raises:
        SparsekError: there is one, and it is not to be replaced: it is left alone.
    """
    from safetensors.numpy import save_file

    metadata = {
        "format": FORMAT,
        "sparsek": json.dumps(block),
        "base": json.dumps(base),
        "texts": json.dumps(texts),
    }
    with disk.part_of(file) as part:  # others may be writing a file of the same name
        with disk.os_errors():
            save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, part, metadata)
            seal(part)
        disk.readable(part, file.parent)
        if overwrite or not _linked(part, file):
            os.replace(part, file)


def _linked(part: Path, file: Path) -> bool:
    """Gives `part` another name that nobody has; False where the file system has no such links."""
    try:
        os.link(part, file)
    except FileExistsError as error:
        raise SparsekError(
            f"another '{file}' appeared meanwhile and is left alone",
            hint="name another file, or add --overwrite to replace it",
        ) from error
    except OSError:
        return False
    return True


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
    except (SafetensorError, OSError, RecursionError):  # the last of JSON nested too deeply
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
