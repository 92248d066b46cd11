"""Whether tensors are still those that were written: a sha256 of them in the file's own header.

Bits that flip afterwards leave numbers, which load as any others. Files without it, of other
programs and of earlier versions, count as they are.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sparsek_cli.checkpoint_files.shards import SEAL, Shard, TensorEntry, blocks, read_shard
from sparsek_cli.errors import SparsekError

_METADATA = "__metadata__"
_THREADS = 4


def digest(
    tensors: Mapping[str, tuple[Shard, TensorEntry]],
    advance: Callable[[int], Any] = lambda done: None,
) -> str:
    """sha256 over tensors in the order of their names: names, dtypes, shapes and every byte."""
    whole = hashlib.sha256()
    with ThreadPoolExecutor(_THREADS) as pool:
        names = sorted(tensors)
        found = pool.map(lambda name: _of_one(*tensors[name]), names)
        for name, own in zip(names, found, strict=True):
            entry = tensors[name][1]
            whole.update(f"{name} {entry.dtype} {list(entry.shape)} {own}\n".encode())
            advance(entry.end - entry.start)
    return whole.hexdigest()


def _of_one(shard: Shard, entry: TensorEntry) -> str:
    found = hashlib.sha256()
    with shard.path.open("rb", buffering=0) as file:
        for block in blocks(file, entry):
            found.update(block)
    return found.hexdigest()


def seal(file: Path) -> None:
    """Puts the digest of a safetensors file's tensors into its header; memory holds all of them."""
    own = _of_file(file)
    with file.open("rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        tensors = opened.read()
    header[_METADATA] = {**header.get(_METADATA, {}), SEAL: own}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # so that tensors stay aligned
    with file.open("wb") as opened:
        opened.write(len(raw).to_bytes(8, "little") + raw)
        opened.write(tensors)


def is_whole(file: Path) -> bool | None:
    """Whether a file's tensors are those that were written; None: it does not say.

    A file that cannot be read is left to who reads it.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np") as opened:
            written = (opened.metadata() or {}).get(SEAL)
    except SafetensorError:
        return None
    return None if written is None else written == _of_file(file)


def check_seal(file: Path) -> None:
    """Raises SparsekError where a file's tensors are not those that were written."""
    if is_whole(file) is False:
        raise SparsekError(
            f"{file} is damaged: its tensors are not those that were written",
            hint="fetch it again, or convert its base again: `sparsek export` gives it. Of tensors "
            f"changed on purpose the file's metadata must not have the key '{SEAL}'",
        )


def _of_file(file: Path) -> str:
    shard = read_shard(file)
    return digest({name: (shard, entry) for name, entry in shard.tensors.items()})
