"""Which files are GGUF files, by how they begin or by their names."""

from pathlib import Path

from sparsek_cli.checkpoint_files.weights_beside import weight_files

SUFFIX = ".gguf"
_MAGIC = b"GGUF"


def is_gguf(file: Path) -> bool:
    """Whether a file is called a GGUF file, or begins as every one does."""
    return file.suffix.lower() == SUFFIX or begins_as_gguf(file)


def begins_as_gguf(file: Path) -> bool:
    """Whether a file begins as every GGUF file does; False where it cannot be read."""
    try:
        with file.open("rb") as opened:
            return opened.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


def gguf_files(folder: Path) -> list[Path]:
    """The files called so at the top of a folder, by name."""
    return [file for file in weight_files(folder) if file.suffix.lower() == SUFFIX]
