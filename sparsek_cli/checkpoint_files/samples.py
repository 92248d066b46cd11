"""Whether a base's files are those that were converted: some bytes of every tensor, hashed.

They lie in a converted folder by hard links, so a program that writes the base in place changes
them too, under scorers that were fitted to what they were. Reading them whole would take longer
than loading; another training of the same model differs in every tensor.

Samples of a base's files stand in the index. A file that finetune writes whole has its own in its
header, as seal.py's hash: who writes the file again leaves none of what it was.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from sparsek_cli.checkpoint_files import json_text
from sparsek_cli.checkpoint_files.shards import (
    INDEX,
    SAMPLE,
    TensorEntry,
    read_metadata,
    read_shard,
)
from sparsek_cli.errors import SparsekError

KEY = SAMPLE  # of the index's metadata: hashes by name of file
BLANK = "0" * 64  # in a header that is written before the sample is known
_BYTES = 256  # of a tensor, in three places
_MOST = 2000  # tensors of a file that are looked into, evenly spread over their names


def sample_of(file: Path) -> str:
    """sha256 over the names, dtypes, shapes and some bytes of a safetensors file's tensors."""
    shard, found = read_shard(file), hashlib.sha256()
    apart = -(-len(shard.tensors) // _MOST)
    with file.open("rb") as opened:
        for number, (name, entry) in enumerate(sorted(shard.tensors.items())):
            found.update(f"{name} {entry.dtype} {list(entry.shape)}\n".encode())
            for place in () if number % apart else _places(entry):
                opened.seek(place)
                found.update(opened.read(min(_BYTES, entry.end - place)))
    return found.hexdigest()


def samples_of(files: Iterable[Path]) -> dict[str, str]:
    """`sample_of` by name of file."""
    return {file.name: sample_of(file) for file in files}


def fill_sample(file: Path) -> None:
    """Puts the sample of a file's tensors in place of `BLANK` in its header, if that is there."""
    with file.open("r+b") as opened:
        length = int.from_bytes(opened.read(8), "little")
        place = opened.read(length).find(json.dumps(BLANK).encode())
        if place >= 0:
            opened.seek(8 + place + 1)
            opened.write(sample_of(file).encode())


def check_samples(folder: Path) -> None:
    """Raises SparsekError where another sample of a file is known than that of its tensors."""
    for name, written in _written(folder).items():
        file = folder / name
        if file.is_file() and sample_of(file) != written:
            raise SparsekError(
                f"{file} holds other weights than those that were converted",
                hint="it is the base's own file, which another program may have written since: "
                "convert the base again. If this is meant, take the file's entry out of "
                f"'{KEY}' in the metadata of {INDEX}",
            )
    for file, written in _own(folder).items():
        if sample_of(file) != written:
            raise SparsekError(
                f"{file} holds other weights than those that were written",
                hint="fetch it again, or repeat its training. Of tensors changed on purpose the "
                f"file's metadata must not have the key '{KEY}'",
            )


def sampled(folder: Path) -> set[str]:
    """Names of files of which a sample is known."""
    return {*_written(folder), *(file.name for file in _own(folder))}


def _own(folder: Path) -> dict[Path, str]:
    """What files that were written whole say of themselves."""
    found = {
        file: read_metadata(file).get(KEY) for file in sorted(folder.glob("model*.safetensors"))
    }
    return {file: said for file, said in found.items() if said is not None}


def _places(entry: TensorEntry) -> tuple[int, int, int]:
    """Start, middle and end of a tensor in its file."""
    last = max(entry.start, entry.end - _BYTES)
    return entry.start, (entry.start + last) // 2, last


def _written(folder: Path) -> dict[str, str]:
    try:
        found = json_text.parse((folder / INDEX).read_text(encoding="utf-8"))["metadata"][KEY]
        # No name leads out of the folder.
        return {Path(str(name)).name: str(value) for name, value in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
