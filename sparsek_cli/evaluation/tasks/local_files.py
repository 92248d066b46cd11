"""The user's own files that tasks read."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from sparsek_cli.errors import UsageError


def data_fingerprint(text: Sequence[str], data: str | None) -> list[tuple[str, int, int]]:
    """Name, size and time of change of every local file a run may read.

    Args:
        text: files, folders or globs of text. data: a folder, or None.
    """
    files: list[Path] = []
    if text:
        from sparsek_cli.data.text.find_files import find_files

        files += find_files(text)
    if data is not None:
        folder = Path(data)
        if not folder.is_dir():
            raise UsageError(f"--data: no such folder '{folder}'", hint="check the path")
        files += sorted(p for p in folder.rglob("*") if p.is_file())
    return as_they_are(files)


def as_they_are(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Name, size and time of change of each: others, once something was written there."""
    return [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
