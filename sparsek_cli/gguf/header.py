"""What a GGUF file says of itself before a tensor is read, and whether it can be read."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsek_cli.errors import SparsekError, UsageError, first_line
from sparsek_cli.gguf.recognise import begins_as_gguf
from sparsek_cli.plain_files import check_no_pointer

if TYPE_CHECKING:
    from gguf import GGUFReader

# Number formats that hold values; all others hold blocks of packed integers and scales.
_VALUES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Factors of rotary frequencies, written for Llama 3.1 and later in place of its settings.
FREQUENCIES = "rope_freqs.weight"
_INSTALL = "pip install gguf (in a checkout: pip install -c constraints.txt -e '.[gguf]')"
_ANOTHER = "name the checkpoint it was made from, or another GGUF file of the model"


@dataclass(frozen=True)
class Header:
    """A GGUF file that can be read.

    Attributes:
        path, bytes: the file.
        architecture: llama.cpp's name of the family.
        formats: number formats of its tensors, the one with most values first.
        values: numbers in all tensors together, `FREQUENCIES` left out.
        head_dim: features of a head, where it says so.
        frequencies: float32 factors by which rotary frequencies are divided, [head_dim / 2].
        stops: token ids that end an answer.
    """

    path: Path
    bytes: int
    architecture: str
    formats: tuple[str, ...]
    values: int
    head_dim: int | None
    frequencies: np.ndarray | None = field(repr=False)
    stops: tuple[int, ...]

    @property
    def dtype(self) -> str:
        """What its weights become: bfloat16, or what they are where nothing is packed."""
        if not set(self.formats) <= set(_VALUES):
            return "bfloat16"
        return _VALUES[self.formats[0]]

    def text(self) -> str:
        """What unpacking makes of it, in words."""
        return f"unpacked from {', '.join(self.formats)} ({self.bytes:,} bytes) to {self.dtype}"


def read_header(file: Path) -> Header:
    """Reads names, types and metadata; tensors stay on disk.

    Raises:
        UsageError: no GGUF file, one of several parts, an adapter, a number format that cannot be
            unpacked, a rotary scaling that would be lost; or the package `gguf` is missing.
        SparsekError: the file is damaged.
    """
    check_no_pointer(file)
    if not begins_as_gguf(file):
        raise UsageError(f"'{file}' is not a GGUF file", hint="name a model's .gguf file")
    if importlib.util.find_spec("gguf") is None:
        raise UsageError(
            f"'{file.name}' is a GGUF file, and the package gguf is missing", hint=_INSTALL
        )
    reader = _open(file)
    architecture = _text(reader, "general.architecture")
    if architecture is None:
        raise SparsekError(f"'{file}' does not name its architecture", hint=_ANOTHER)
    _check_is_whole_model(reader, file)
    _check_formats(reader, file)
    _check_rotary(reader, file, architecture)
    counts: dict[str, int] = {}
    frequencies = None
    for tensor in reader.tensors:
        if tensor.name == FREQUENCIES:
            frequencies = np.array(tensor.data, dtype=np.float32)
        else:
            name = tensor.tensor_type.name
            counts[name] = counts.get(name, 0) + int(tensor.n_elements)
    stops = (_number(reader, f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
    return Header(
        path=file.resolve(),
        bytes=file.stat().st_size,
        architecture=architecture,
        formats=tuple(sorted(counts, key=lambda name: -counts[name])),
        values=sum(counts.values()),
        head_dim=_number(reader, f"{architecture}.attention.key_length"),
        frequencies=frequencies,
        stops=tuple(dict.fromkeys(stop for stop in stops if stop is not None)),
    )


def _open(file: Path) -> GGUFReader:
    from gguf import GGUFReader

    class Bounded(GGUFReader):
        """Ends where the file does: a list said to be of 2^60 values is not looked for."""

        def _get(self, offset: int, dtype: Any, count: int = 1, **order: Any) -> Any:
            if offset + np.dtype(dtype).itemsize * int(count) > len(self.data):
                raise ValueError("it ends within its header")
            return super()._get(offset, dtype, count, **order)

    try:
        return Bounded(file)
    except Exception as error:
        # A header cut short or overwritten fails in as many ways as there are fields.
        why = first_line(error)
        if "GGMLQuantizationType" in why:
            raise UsageError(
                f"'{file.name}' holds tensors of a number format that is not known: {why}",
                hint=f"upgrade the package gguf ({version('gguf')}), or {_ANOTHER}",
            ) from error
        raise SparsekError(
            f"'{file}' is damaged or cut short: {why}", hint="fetch the file again"
        ) from error


def _check_is_whole_model(reader: GGUFReader, file: Path) -> None:
    if (_number(reader, "split.count") or 0) > 1:
        raise UsageError(
            f"'{file.name}' is one of {_number(reader, 'split.count')} parts of a model",
            hint="merge them first: llama-gguf-split --merge FIRST.gguf WHOLE.gguf",
        )
    kind = _text(reader, "general.type") or "model"
    if kind != "model":
        raise UsageError(f"'{file.name}' holds no model: it is of type '{kind}'", hint=_ANOTHER)


def _check_formats(reader: GGUFReader, file: Path) -> None:
    from gguf import GGML_QUANT_SIZES, dequantize

    first = {tensor.tensor_type: tensor.name for tensor in reversed(reader.tensors)}
    for kind, tensor in first.items():
        if kind.name in _VALUES:
            continue
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except Exception as error:  # NotImplementedError, and what integer formats end in
            raise UsageError(
                f"'{file.name}' holds tensors of format {kind.name} ({tensor}), which cannot be "
                "unpacked",
                hint=_ANOTHER,
            ) from error


def _check_rotary(reader: GGUFReader, file: Path, architecture: str) -> None:
    """transformers reads no scaling of rotary positions from such files, and says nothing."""
    scaling = _text(reader, f"{architecture}.rope.scaling.type")
    longer = [t.name for t in reader.tensors if t.name.startswith("rope_factors")]
    if scaling not in (None, "none") or longer:
        raise UsageError(
            f"'{file.name}' scales rotary positions ({scaling or longer[0]}), which is lost when "
            "transformers reads it",
            hint=_ANOTHER,
        )


def _field(reader: GGUFReader, key: str) -> Any:
    found = reader.fields.get(key)
    return None if found is None else found.contents()


def _text(reader: GGUFReader, key: str) -> str | None:
    value = _field(reader, key)
    return value if isinstance(value, str) else None


def _number(reader: GGUFReader, key: str) -> int | None:
    value = _field(reader, key)
    return int(value) if isinstance(value, int | np.integer) else None
