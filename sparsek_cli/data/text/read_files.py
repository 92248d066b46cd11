"""Texts out of files: plain, .jsonl and .parquet, each perhaps compressed."""

import codecs
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from sparsek_cli.data.text.columns import text_of
from sparsek_cli.data.text.unpack import PACKED, is_packed, open_bytes
from sparsek_cli.errors import UsageError
from sparsek_cli.plain_files import check_no_pointer

# A file that unpacks to more, or a line without an end, is no document.
LARGEST = 1 << 32  # bytes
# UTF-32's first, whose mark begins with UTF-16's.
_OTHER_MARKS = (
    ((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE), "UTF-32"),
    ((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE), "UTF-16"),
)


def file_rows(files: Sequence[str], column: str | None) -> Iterator[dict[str, str]]:
    empty = True
    for file in files:
        for text in _texts_of(Path(file), column):
            if text.strip():
                empty = False
                yield {"text": text}
    if empty:
        shown = files[0] if len(files) == 1 else f"{len(files)} files ({files[0]}, ...)"
        raise UsageError(f"no text in {shown}", hint="every document there is empty or blank")


def _texts_of(path: Path, column: str | None) -> Iterator[str]:
    check_no_pointer(path)
    kind = path.name.lower().removesuffix(PACKED)
    try:
        if kind.endswith(".parquet"):
            yield from _parquet(path, column)
            return
        with open_bytes(path) as stream:
            if kind.endswith(".jsonl"):
                for where, row in _objects(stream, path):
                    yield text_of(row, column, where)
            else:
                # "\r\n" would otherwise be tokens of its own.
                yield _decode(_bounded(stream.read(LARGEST + 1), path), path, 0).replace(
                    "\r\n", "\n"
                )
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> UsageError:
    return UsageError(f"cannot read {path}: {error.strerror or error}", hint="check the file")


def _bounded(raw: bytes, where: object) -> bytes:
    if len(raw) > LARGEST:
        raise UsageError(
            f"{where}: a document of more than {LARGEST >> 30} GiB", hint="split it into several"
        )
    return raw


def check_bytes(raw: bytes, path: str | Path, offset: int) -> None:
    """Raises UsageError where bytes of a file, which begin at an offset, are of no UTF-8 text.

    UTF-16 without a mark may be valid UTF-8, with a null byte behind each letter.
    """
    for marks, name in _OTHER_MARKS:
        if offset == 0 and raw.startswith(marks):
            raise UsageError(
                f"{path} is not UTF-8 text: it begins as {name} does",
                hint=f"convert it: iconv -f {name.lower()} -t utf-8 IN > OUT",
            )
    if b"\0" in raw:
        raise UsageError(
            f"{path} is not UTF-8 text: it holds a null byte at position {offset + raw.index(0)}",
            hint="of UTF-16 without a mark: iconv -f utf-16le -t utf-8 IN > OUT; else clean it",
        )


def _decode(raw: bytes, path: Path, offset: int) -> str:
    check_bytes(raw, path, offset)
    try:
        return raw.decode("utf-8" if offset else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is not UTF-8 text: byte {raw[error.start]:#04x} at position "
            f"{offset + error.start}",
            hint="convert it: iconv -f latin1 -t utf-8 IN > OUT",
        ) from error


def json_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """The objects of a .jsonl or .jsonl.zst, each with FILE:LINE; blank lines are none.

    Raises:
        UsageError: the file cannot be read, or a line of it holds no JSON object.
    """
    check_no_pointer(path)
    try:
        with open_bytes(path) as stream:
            yield from _objects(stream, path)
    except OSError as error:
        raise _unreadable(path, error) from error


def _objects(stream: BinaryIO, path: Path) -> Iterator[tuple[str, dict]]:
    offset = 0
    lines = iter(lambda: stream.readline(LARGEST + 1), b"")
    for number, raw in enumerate(lines, start=1):
        line = _decode(_bounded(raw, f"{path}:{number}"), path, offset)
        offset += len(raw)
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except RecursionError as error:
            raise _bad_row(path, number, "nested too deeply") from error
        except ValueError as error:  # of JSON, or of a number too long
            raise _bad_row(path, number, getattr(error, "msg", str(error))) from error
        if not isinstance(row, dict):
            raise UsageError(
                f"{path}:{number}: not a JSON object",
                hint="a .jsonl file has one JSON object per line",
            )
        yield f"{path}:{number}", row


def _bad_row(path: Path, number: int, why: str) -> UsageError:
    return UsageError(
        f"{path}:{number}: not valid JSON: {why}", hint="a .jsonl file has one JSON object per line"
    )


def _parquet(path: Path, column: str | None) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    source = str(path)
    if is_packed(path):
        with open_bytes(path) as stream:
            source = pyarrow.BufferReader(_bounded(stream.read(LARGEST + 1), path))
    try:
        file = pyarrow.parquet.ParquetFile(source)
        wanted = column or "text"
        if wanted not in file.schema_arrow.names:
            text_of(dict.fromkeys(file.schema_arrow.names), column, str(path))
        number = 0
        for batch in file.iter_batches(batch_size=256, columns=[wanted]):
            for row in batch.to_pylist():
                number += 1
                yield text_of(row, column, f"{path}: row {number}")
    except pyarrow.ArrowInvalid as error:
        raise UsageError(
            f"{path} is not a readable parquet file: {str(error).splitlines()[0]}",
            hint="fetch it again",
        ) from error
