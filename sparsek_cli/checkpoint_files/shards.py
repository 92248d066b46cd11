"""Base checkpoints as they lie on disk: headers, lengths, index, and a streamed look for NaN.

Only headers are parsed; tensor bytes are read through one small buffer, never mapped, so that
memory stays flat whatever the size of the model.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, BinaryIO

from sparsek_cli.checkpoint_files import json_text
from sparsek_cli.errors import SparsekError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SEAL = "sparsek_sha256"  # in a file's metadata, see seal.py; a "sha256" may be other programs'
SAMPLE = "sparsek_samples"  # in a file's metadata, see samples.py

# The safetensors format allows headers up to 100 MB; a larger number means garbage.
_LONGEST_HEADER = 100_000_000
_MOST_TENSORS = 300_000  # in one file; a model of 400 experts in 60 layers has 75,000
_AGAIN = "download or save the checkpoint again"
_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_BUFFER = 1 << 24


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a shard: safetensors dtype name, shape, byte range in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Shard:
    """One safetensors file: where it is, its bytes, and what its header lists.

    `part` says that `tensors` are not all that the header lists.
    """

    path: Path
    bytes: int
    tensors: dict[str, TensorEntry] = field(repr=False)
    part: bool = False


def read_shard(path: Path) -> Shard:
    """Parses a safetensors header and checks it against the file's length.

    Raises:
        SparsekError: the file is corrupt or shorter (or longer) than its header says.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > _LONGEST_HEADER or length < 2:
            raise SparsekError(f"corrupt safetensors file: {path}", hint=_AGAIN)
        if 8 + length > size:
            raise SparsekError(
                f"truncated shard: {path} ends inside its header ({size:,} bytes)", hint=_AGAIN
            )
        raw = file.read(length)
    try:
        tensors = _tensors(raw, 8 + length)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        why = f": {error}" if isinstance(error, _Lie | json_text.GivenTwice) else ""
        raise SparsekError(f"corrupt safetensors file: {path}{why}", hint=_AGAIN) from error
    expected = max((entry.end for entry in tensors.values()), default=8 + length)
    if size < expected:
        raise SparsekError(
            f"truncated shard: {path} has {size:,} of {expected:,} bytes", hint=_AGAIN
        )
    if size > expected:
        raise SparsekError(
            f"corrupt safetensors file: {path} has {size - expected:,} bytes too many", hint=_AGAIN
        )
    return Shard(path, size, tensors)


def read_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself beside its tensors; nothing if it cannot be read."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            found = json.loads(file.read(min(length, _LONGEST_HEADER))).get("__metadata__")
        return {str(key): str(value) for key, value in (found or {}).items()}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}


class _Lie(ValueError):
    """A header that contradicts itself."""


def _tensors(raw: bytes, start: int) -> dict[str, TensorEntry]:
    """The tensors that a header lists, if their types, shapes and places agree.

    Args:
        raw: the header's JSON. start: where in the file the tensors begin.
    """
    header = json_text.parse(raw)
    if not isinstance(header, dict):
        raise _Lie("its header is no JSON object")
    header.pop("__metadata__", None)
    if len(header) > _MOST_TENSORS:
        raise _Lie(f"it names {len(header):,} tensors, more than any model has")
    tensors = {}
    for name, entry in header.items():
        kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if kind not in _BITS:
            raise _Lie(f"{name} has dtype {kind!r}")
        if not all(type(n) is int and n >= 0 for n in (*shape, *offsets)) or len(offsets) != 2:
            raise _Lie(f"{name} has shape {shape} at {offsets}")
        first, last = offsets
        if 8 * (last - first) != math.prod(shape) * _BITS[kind]:
            raise _Lie(f"{name} of shape {shape}, {kind}, takes {last - first} bytes")
        tensors[name] = TensorEntry(kind, tuple(shape), start + first, start + last)
    at = start
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != at:
            raise _Lie(f"{name} overlaps its neighbour, or leaves a gap")
        at = entry.end
    return tensors


def read_shards(folder: Path) -> list[Shard]:
    """The shards of a checkpoint folder in the order of their names.

    Raises:
        SparsekError: no safetensors weights, a shard that the index names is missing, a tensor
            that the index names is not where it says, or a shard is damaged.
    """
    index = folder / INDEX
    if not index.is_file():
        single = folder / SINGLE
        if single.is_file():
            return [read_shard(single)]
        raise SparsekError(_no_weights(folder), hint=_weights_hint(folder))
    try:
        content = json_text.parse(index.read_text(encoding="utf-8"))
        weight_map: dict[str, str] = content["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        said = isinstance(error, json_text.GivenTwice | json_text.Marked)
        why = f": {error}" if said else ""
        raise SparsekError(f"corrupt index: {index}{why}", hint=_AGAIN) from error
    if not names:
        raise SparsekError(f"corrupt index: {index} names no weights", hint=_AGAIN)
    for name in names:
        if not isinstance(name, str):
            raise SparsekError(f"corrupt index: {index} names {name!r} as a file", hint=_AGAIN)
        if Path(name).name != name:
            raise SparsekError(
                f"{index} names a file that is not beside it: {name}",
                hint="lay every file of weights beside the index, and name each by its name alone",
            )
        if not (folder / name).is_file():
            raise SparsekError(f"{index.name} names {name}, which is missing", hint=_AGAIN)
    shards = [read_shard(folder / name) for name in names]
    held = {shard.path.name: shard.tensors for shard in shards}
    places: dict[str, str] = {}
    for name, tensors in held.items():
        for tensor in tensors:
            if tensor in places:
                raise SparsekError(
                    f"{tensor} is both in {places[tensor]} and in {name}: it is not clear which "
                    "counts",
                    hint=_AGAIN,
                )
            places[tensor] = name
    for tensor, name in weight_map.items():
        if tensor not in held[name]:
            raise SparsekError(
                f"{index.name} expects {tensor} in {name}, which does not hold it", hint=_AGAIN
            )
    if not isinstance(content.get("metadata"), dict):  # what transformers raises names no file
        raise SparsekError(
            f'{index} has no object "metadata", and transformers does not read it without',
            hint='write "metadata": {} beside its "weight_map"',
        )
    return shards


def stored_dtype(shards: list[Shard]) -> str:
    """The torch name of the number format that most bytes of the weights have."""
    bytes_of = dict.fromkeys(_FLOATS, 0)
    for shard in shards:
        for entry in shard.tensors.values():
            if entry.dtype in bytes_of:
                bytes_of[entry.dtype] += entry.end - entry.start
    return _FLOATS[max(bytes_of, key=lambda name: bytes_of[name])]


def without_scorers(shards: list[Shard]) -> list[Shard]:
    """The shards of a converted checkpoint with the base's tensors alone."""
    kept = []
    for shard in shards:
        tensors = {name: e for name, e in shard.tensors.items() if ".scorer." not in name}
        if tensors:
            part = len(tensors) < len(shard.tensors)
            kept.append(replace(shard, tensors=tensors, part=part))
    return kept


def write_part(shard: Shard, target: Path) -> None:
    """A safetensors file with the tensors of `shard` alone, their bytes unchanged."""
    with shard.path.open("rb") as source:
        raw = source.read(int.from_bytes(source.read(8), "little"))
    # torchao's metadata says what its tensors are parts of.
    metadata = json.loads(raw).get("__metadata__") or {"format": "pt"}
    for key in (SEAL, SAMPLE):  # of all tensors
        metadata.pop(key, None)
    header: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for name, entry in shard.tensors.items():
        size = entry.end - entry.start
        header[name] = {
            "dtype": entry.dtype, "shape": entry.shape, "data_offsets": (at, at + size)
        }  # fmt: skip
        at += size
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with shard.path.open("rb") as source, target.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for entry in shard.tensors.values():
            for block in blocks(source, entry):
                file.write(block)


def same_tensors(shard: Shard, path: Path) -> bool:
    """Whether the file `path` holds the tensors of `shard`, byte for byte."""
    other = read_shard(path).tensors
    if other.keys() != shard.tensors.keys():
        return False
    with shard.path.open("rb") as a, path.open("rb") as b:
        for name, entry in shard.tensors.items():
            mine, theirs = blocks(a, entry), blocks(b, other[name])
            if any(x != y for x, y in zip_longest(mine, theirs)):
                return False
    return True


def blocks(file: BinaryIO, entry: TensorEntry) -> Iterator[bytes]:
    """The bytes of a tensor, a buffer at a time."""
    for start in range(entry.start, entry.end, _BUFFER):
        file.seek(start)
        yield file.read(min(_BUFFER, entry.end - start))


def _no_weights(folder: Path) -> str:
    return f"no safetensors weights in {folder}"


def _weights_hint(folder: Path) -> str:
    if any(folder.glob("*.bin")):
        return "pickled weights are not read; load and `save_pretrained` them once as safetensors"
    return f"expected {SINGLE} or {INDEX}"


def find_nan(
    shards: list[Shard], *, limit: int, advance: Callable[[int], None] = lambda done: None
) -> bool:
    """Looks for NaN and infinity in every floating tensor, through one buffer of 16 MB.

    A mask's value (`masked_bias` of old files, -1e9) is infinite in float16, and nobody reads it.

    Args:
        shards: what to read.
        limit: bytes to read at most; beyond it each tensor is sampled in evenly spaced buffers.
        advance: called with the number of bytes just read.

    Returns:
        Whether every byte was read (False: sampled).

    Raises:
        SparsekError: a tensor holds one of them; the message names it and its file.
    """
    import torch

    total = sum(shard.bytes for shard in shards)
    stride = max(1, -(-total // limit))
    buffer = bytearray(_BUFFER)
    view = memoryview(buffer)
    for shard in shards:
        with shard.path.open("rb", buffering=0) as file:
            for name, entry in shard.tensors.items():
                if entry.dtype not in _FLOATS:
                    continue
                dtype = getattr(torch, _FLOATS[entry.dtype])
                for start in range(entry.start, entry.end, _BUFFER * stride):
                    file.seek(start)
                    count = file.readinto(view[: min(_BUFFER, entry.end - start)])
                    values = torch.frombuffer(buffer, dtype=dtype, count=count // dtype.itemsize)
                    # aminmax propagates NaN and is several times faster than isnan().any().
                    ends = torch.stack(torch.aminmax(values)) if values.numel() else values
                    mask = name.endswith("masked_bias") and not ends.isnan().any()
                    if not (ends.isfinite().all() or mask):
                        what = "NaN" if ends.isnan().any() else "infinite"
                        raise SparsekError(
                            f"{what} weights: {name} in {shard.path.name}",
                            hint="the checkpoint is damaged; " + _AGAIN,
                        )
                    advance(count)
    return stride == 1
