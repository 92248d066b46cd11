"""sha256 of files of weights as they were written; `sparsek doctor`, `push` and `export` compare.

Those of a base's files stand in the model's index, others in the file itself. Loading does not
compare them: hashing gigabytes takes longer than mapping them. It compares samples (samples.py).
"""

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from sparsek_cli.checkpoint_files import json_text
from sparsek_cli.checkpoint_files.seal import is_whole
from sparsek_cli.checkpoint_files.shards import INDEX
from sparsek_cli.errors import SparsekError

KEY = "sha256"  # of the index's metadata: hashes by name of file
SOON = 2 * 2**30  # bytes that are hashed in seconds: of more it counts what is known already
_HASH = re.compile(r"[0-9a-f]{64}")


def hash_of(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def known_hash(file: Path) -> str | None:
    """What the hub says of a file of its cache, which is named after it; None of other files."""
    blob = file.resolve()
    named = blob.parent.name == "blobs" and _HASH.fullmatch(blob.name)
    return blob.name if named else None


def written_hashes(folder: Path) -> dict[str, str]:
    """By name of file, what the index of a checkpoint folder says; empty where it says nothing."""
    try:
        found = json_text.parse((folder / INDEX).read_text(encoding="utf-8"))["metadata"][KEY]
        hashes = {str(name): str(value).lower() for name, value in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    return {name: value for name, value in hashes.items() if _HASH.fullmatch(value)}


def as_written(folder: Path, names: Iterable[str]) -> dict[str, bool | None]:
    """By name of file, whether it is what was written; None: nothing says what that was."""
    written = written_hashes(folder)
    return {
        name: hash_of(folder / name) == written[name]
        if name in written
        else is_whole(folder / name)
        for name in names
    }


def check_as_written(file: Path) -> None:
    """Raises SparsekError where it is known that a file of weights is not what was written."""
    if as_written(file.parent, [file.name])[file.name] is False:
        raise SparsekError(
            f"'{file}' is not what was written (sha256)",
            hint="fetch the model, or convert its base, again; of files changed on purpose take "
            f"the sha256 out of the metadata of {INDEX}, or their own",
        )
