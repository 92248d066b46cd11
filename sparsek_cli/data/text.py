"""Text from anywhere: files, folders, globs or a hub dataset, as one stream of documents."""

import codecs
import glob
import io
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from sparsek_cli.errors import SparsekError, UsageError

if TYPE_CHECKING:
    from datasets import IterableDataset

_LOG = logging.getLogger("sparsek_cli")
PLAIN = (".txt", ".md", ".py")
SUFFIXES = (".jsonl", *PLAIN, ".parquet")
READABLE = tuple(s + z for s in SUFFIXES for z in ("", ".zst"))
# A file that unpacks to more, or a line without an end, is no document.
LARGEST = 1 << 32  # bytes
MOST_NAMES = 12  # of columns, in a message
# What columns of conversations are called.
CHATS = ("messages", "conversations", "conversation", "dialogue")
# UTF-32's first, whose mark begins with UTF-16's.
_OTHER_MARKS = (
    ((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE), "UTF-32"),
    ((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE), "UTF-16"),
)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def read_documents(
    spec: str | Path | Sequence[str | Path],
    *,
    name: str | None = None,
    split: str = "train",
    column: str | None = None,
) -> "IterableDataset":
    """Documents as a stream of {"text": str}, in a fixed order, blank ones left out.

    A .txt, .md or .py file is one document; each row of a .jsonl or .parquet file is one.

    Args:
        spec: files, folders (searched below), globs, or one hub dataset id "owner/name".
        name, split: configuration and split of a hub dataset.
        column: column that holds the text; default "text".

    Raises:
        UsageError: nothing there, unknown file type, no such column, or not UTF-8. What is wrong
            with the contents is raised when the document is reached.
        SparsekError: the hub cannot be reached.
    """
    from datasets import IterableDataset

    if is_hub_id(spec):
        return IterableDataset.from_generator(
            _hub_rows, gen_kwargs={"hub_id": str(spec), "name": name, "split": split,
                                   "column": column},
        )  # fmt: skip
    files = find_files(spec)
    return IterableDataset.from_generator(
        _file_rows, gen_kwargs={"files": tuple(map(str, files)), "column": column}
    )


def iterate_texts(
    spec: str | Path | Sequence[str | Path],
    *,
    name: str | None = None,
    split: str = "train",
    column: str | None = None,
) -> Iterator[str]:
    """The texts of `read_documents` as plain strings, without importing `datasets` for files."""
    if is_hub_id(spec):
        rows = _hub_rows(hub_id=str(spec), name=name, split=split, column=column)
    else:
        rows = _file_rows(files=tuple(map(str, find_files(spec))), column=column)
    for row in rows:
        yield row["text"]


def is_hub_id(spec: object) -> bool:
    """Whether `spec` can only mean a dataset on the hub."""
    return (
        isinstance(spec, str)
        and HUB_ID.fullmatch(spec) is not None
        and not spec.endswith(READABLE)
        and not Path(spec).exists()
    )


def find_files(spec: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files that `spec` means, each once, sorted within each folder or glob.

    Raises:
        UsageError: a path is missing, a folder or glob holds nothing readable, or a file has a
            type that is not read.
    """
    items: Iterable = [spec] if isinstance(spec, str | Path) else spec
    found: dict[Path, None] = {}
    for item in items:
        path = Path(item).expanduser()
        if path.is_file():
            if not path.name.endswith(READABLE):
                raise UsageError(f"cannot read '{path}': unknown file type", hint=_kinds())
            matches = [path]
        elif path.is_dir():
            held = sorted(p for p in path.rglob("*") if _is_visible(p))
            matches = [p for p in held if _wanted(p)]
            if not matches:
                raise UsageError(f"folder '{path}' holds no text files", hint=_kinds())
            _say_what_is_left_out(path, held)
        elif glob.has_magic(str(path)):
            named = (Path(p) for p in sorted(glob.glob(str(path), recursive=True)))
            matches = [p for p in named if _wanted(p)]
            if not matches:
                raise UsageError(f"no text file matches '{path}'", hint=_kinds())
        elif os.path.lexists(path) and not path.is_symlink():
            raise UsageError(
                f"'{path}' is no plain file: it cannot be read twice",
                hint="write its text into a file first, and name that",
            )
        else:
            raise UsageError(
                f"no such file or folder: '{path}'",
                hint="name a file, folder, glob, or a hub dataset as owner/name",
            )
        found.update(dict.fromkeys(matches))
    if not found:
        raise UsageError("no text was named", hint=_kinds())
    return list(found)


def _is_visible(path: Path) -> bool:
    return path.is_file() and not path.name.startswith(".")


def _wanted(path: Path) -> bool:
    return _is_visible(path) and path.name.endswith(READABLE)


def _say_what_is_left_out(folder: Path, held: list[Path]) -> None:
    """A folder may hold a licence or a picture; that its .csv is not read must be known."""
    others = Counter(path.suffix or path.name for path in held if not _wanted(path))
    if others:
        kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common(4))
        more = ", ..." if len(others) > 4 else ""
        _warn_once(f"'{folder}': files of types that are not read: {kinds}{more}")


@cache
def _warn_once(message: str) -> None:
    _LOG.warning("%s", message)


def _kinds() -> str:
    return f"readable: {' '.join(SUFFIXES)}, each also with .zst"


def _file_rows(files: Sequence[str], column: str | None) -> Iterator[dict[str, str]]:
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
    kind = path.name.removesuffix(".zst")
    try:
        if kind.endswith(".parquet"):
            yield from _parquet(path, column)
            return
        with _open(path) as stream:
            if kind.endswith(".jsonl"):
                yield from _jsonl(stream, path, column)
            else:
                # "\r\n" would otherwise be tokens of its own.
                yield _decode(_bounded(stream.read(LARGEST + 1), path), path, 0).replace(
                    "\r\n", "\n"
                )
    except OSError as error:
        raise UsageError(
            f"cannot read {path}: {error.strerror or error}", hint="check the file"
        ) from error


def _open(path: Path) -> BinaryIO:
    if path.suffix != ".zst":
        return path.open("rb")
    import zstandard

    raw = zstandard.ZstdDecompressor().stream_reader(
        path.open("rb"), read_across_frames=True, closefd=True
    )
    return io.BufferedReader(_Checked(raw, path), buffer_size=1 << 20)


class _Checked(io.RawIOBase):
    """A decompressing stream whose errors name the file."""

    def __init__(self, stream: BinaryIO, path: Path):
        self._stream, self._path = stream, path

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        import zstandard

        try:
            return self._stream.readinto(buffer)
        except zstandard.ZstdError as error:
            raise UsageError(
                f"{self._path} is not a readable .zst file: {error}", hint="fetch it again"
            ) from error

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()


def _bounded(raw: bytes, where: object) -> bytes:
    if len(raw) > LARGEST:
        raise UsageError(
            f"{where}: a document of more than {LARGEST >> 30} GiB", hint="split it into several"
        )
    return raw


def _decode(raw: bytes, path: Path, offset: int) -> str:
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
    try:
        return raw.decode("utf-8" if offset else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is not UTF-8 text: byte {raw[error.start]:#04x} at position "
            f"{offset + error.start}",
            hint="convert it: iconv -f latin1 -t utf-8 IN > OUT",
        ) from error


def _jsonl(stream: BinaryIO, path: Path, column: str | None) -> Iterator[str]:
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
                f"{path}:{number}: not a JSON object", hint='write {"text": ...} on each line'
            )
        yield _pick(row, column, f"{path}:{number}")


def _bad_row(path: Path, number: int, why: str) -> UsageError:
    return UsageError(
        f"{path}:{number}: not valid JSON: {why}", hint="a .jsonl file has one JSON object per line"
    )


def _parquet(path: Path, column: str | None) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    source = str(path)
    if path.suffix == ".zst":
        with _open(path) as stream:
            source = pyarrow.BufferReader(_bounded(stream.read(LARGEST + 1), path))
    try:
        file = pyarrow.parquet.ParquetFile(source)
        wanted = column or "text"
        if wanted not in file.schema_arrow.names:
            _pick(dict.fromkeys(file.schema_arrow.names), column, str(path))
        number = 0
        for batch in file.iter_batches(batch_size=256, columns=[wanted]):
            for row in batch.to_pylist():
                number += 1
                yield _pick(row, column, f"{path}: row {number}")
    except pyarrow.ArrowInvalid as error:
        raise UsageError(
            f"{path} is not a readable parquet file: {str(error).splitlines()[0]}",
            hint="fetch it again",
        ) from error


def _pick(row: dict, column: str | None, where: str) -> str:
    wanted = column or "text"
    chat = [name for name in ([wanted] if wanted in row else CHATS) if _is_chat(row, name)]
    if chat:
        raise UsageError(
            f"{where}: column '{chat[0]}' holds conversations, and only text is read",
            hint="write each as text into a column 'text' first: tokenizer.apply_chat_template("
            "[{'role': 'user', 'content': ...}, ...], tokenize=False)",
        )
    if wanted not in row:
        names = [str(name) for name in islice(row, MOST_NAMES)]
        names += ["..."] * (len(row) > MOST_NAMES)
        raise UsageError(
            f"{where}: no column '{wanted}'; it has: {', '.join(names)}",
            hint="name the column that holds the text (key 'column' in a recipe)",
        )
    text = row[wanted]
    if text is None:
        return ""  # left out, as a blank one is
    if not isinstance(text, str):
        raise UsageError(
            f"{where}: column '{wanted}' holds {type(text).__name__}, not text",
            hint="name the column that holds the text (key 'column' in a recipe)",
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{where}: the text is not valid Unicode: half a surrogate pair at character "
            f"{error.start}",
            hint="leave it out, or replace it (U+FFFD)",
        ) from error
    return text


def _is_chat(row: dict, name: str) -> bool:
    """Whether a column holds lists of messages, or is called so and its values are not known."""
    value = row.get(name)
    turns = value if isinstance(value, list) else ()
    named = name in row and name in CHATS and all(v is None for v in row.values())
    return named or any(isinstance(turn, dict) for turn in turns)


def _hub_rows(
    hub_id: str, name: str | None, split: str, column: str | None
) -> Iterator[dict[str, str]]:
    from datasets import load_dataset

    try:
        rows = load_dataset(hub_id, name, split=split, streaming=True)
    except ValueError as error:  # unknown configuration or split; the message lists the known ones
        raise UsageError(
            f"dataset '{hub_id}': {str(error).splitlines()[0]}",
            hint="set 'name' and 'split' to ones it has",
        ) from error
    except Exception as error:
        raise SparsekError(
            f"dataset '{hub_id}' cannot be read from the hub: {str(error).splitlines()[0]}",
            hint="check the id and the network, or name a local file or folder",
        ) from error
    empty = True
    for row in rows:
        text = _pick(row, column, hub_id)
        if text.strip():
            empty = False
            yield {"text": text}
    if empty:
        raise UsageError(f"dataset '{hub_id}' ({split}) holds no text", hint="try another split")
