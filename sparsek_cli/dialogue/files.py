"""Documents that a conversation reads, and files that it is written to."""

import logging
from codecs import getincrementaldecoder
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from difflib import get_close_matches
from io import IncrementalNewlineDecoder
from itertools import chain
from pathlib import Path
from typing import Any

from sparsek_cli.data.pieces import BLOCK, text_of
from sparsek_cli.data.text.made_folders import say_made, without_made
from sparsek_cli.data.text.read_files import check_bytes
from sparsek_cli.dialogue.session import Session
from sparsek_cli.disk import check_name, write_atomically
from sparsek_cli.errors import SparsekError, UsageError
from sparsek_cli.plain_files import check_no_pointer

_LOG = logging.getLogger("sparsek_cli")
ProgressMaker = Callable[[str, float], AbstractContextManager[Any]]

# What a folder is searched for.
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".json", ".csv", ".html", ".toml", ".yaml", ".log")


def load_path(session: Session, name: str, *, progress: ProgressMaker) -> bool:
    """Reads a file, or every text file below a folder, into the open turn.

    Returns:
        False when Ctrl-C stopped it; what was read stays.

    Raises:
        UsageError: nothing there, not UTF-8, empty, or a folder without text files.
    """
    check_name(name)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return load_file(session, name, progress=progress)
    files = [path for path in sorted(folder.rglob("*")) if _is_text(path, folder)]
    files, made = without_made(files, folder)
    if made:
        _LOG.warning("%s", say_made(folder, made))
    if not files:
        raise UsageError(
            f"no text files below '{name}'", hint="they end in " + ", ".join(TEXT_SUFFIXES)
        )
    sizes = {path: _characters(path) for path in files}
    moment = session.moment()  # one for all: it copies the cache
    with progress(f"reading {len(files)} files", sum(sizes.values())) as bar:
        for path in files:
            file = str(path.relative_to(folder))
            parts = chain([f"{file}:\n"], _parts(path))
            if sizes[path] and not session.load(
                parts, file, on_progress=bar.advance, moment=moment
            ):
                return False
    return True


def _is_text(path: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return path.suffix.lower() in TEXT_SUFFIXES and not hidden and path.is_file()


def load_file(session: Session, file: str, *, progress: ProgressMaker) -> bool:
    """Reads a UTF-8 text file into the open turn; False when Ctrl-C stopped it.

    Raises:
        UsageError: no such file, not UTF-8, or empty.
    """
    path = Path(file).expanduser()
    length = _characters(path, file)
    parts = _parts(path, file) if length else ()
    with progress(f"reading {path.name}", length) as bar:
        return session.load(parts, path.name, on_progress=bar.advance)


def _characters(path: Path, name: str | None = None) -> int:
    """How many characters a file has; 0 where all are blank. Refuses what `_parts` would."""
    length, blank = 0, True
    for part in _parts(path, name):
        length += len(part)
        blank = blank and not part.strip()
    return 0 if blank else length


def _parts(path: Path, name: str | None = None) -> Iterator[str]:
    """The text of a file, a block at a time: a long one is never held as a whole."""
    name = name or str(path)
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise UsageError(f"'{name}' is no plain file", hint="name a text file or a folder of some")
    check_no_pointer(path)
    read = 0  # bytes that were text
    decoder = IncrementalNewlineDecoder(getincrementaldecoder("utf-8-sig")(), translate=True)
    try:
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                check_bytes(block, name, read)
                yield decoder.decode(block)
                read += len(block)
            yield decoder.decode(b"", final=True)
    except FileNotFoundError as error:
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = get_close_matches(path.name, beside, n=1)
        hint = f"did you mean '{path.parent / near[0]}'?" if near else "check the path"
        raise UsageError(f"no such file: '{name}'", hint=hint) from error
    except UnicodeDecodeError as error:
        kept = len(error.object) - len(block)  # of an earlier block, a character's first bytes
        raise UsageError(
            f"'{name}' is not UTF-8 text (byte {read - kept + error.start})",
            hint="convert it (iconv -t utf-8); of a PDF, Word, Parquet or packed file, write the "
            "text into a file first",
        ) from error
    except OSError as error:
        raise UsageError(
            f"cannot read '{name}': {error.strerror}", hint="check the path"
        ) from error


def save_conversation(session: Session, path: Path) -> None:
    """Writes what was said as JSON (.json) or as text; adds it as a line to a .jsonl file.

    The line has the messages, and under "text" the conversation as the model saw it, documents
    and special tokens included: what `sparsek finetune --data` reads.

    Raises:
        SparsekError: the file cannot be written.
    """
    import json

    if path.suffix == ".jsonl":
        text = json.dumps(
            {
                "text": text_of(session.tokenizer, session.engine.said()),
                "system": session.system,
                "messages": session.messages,
            },
            ensure_ascii=False,
        )
    elif path.suffix == ".json":
        text = json.dumps({"system": session.system, "messages": session.messages}, indent=2)
    else:
        start = [f"system: {session.system}"] if session.system else []
        text = "\n\n".join([*start, *(f"{m['role']}: {m['content']}" for m in session.messages)])
    try:
        if path.suffix == ".jsonl":
            _add_line(path, text)
        else:
            path.parent.stat()  # is not made here
            write_atomically(path, text + "\n")
    except OSError as error:
        raise SparsekError(
            f"cannot write '{path}': {error.strerror}", hint="choose another file"
        ) from error


def _add_line(path: Path, line: str) -> None:
    """The whole line or, on a full disk, nothing of it: the next would be added to its half."""
    with path.open("ab", buffering=0) as file:  # a buffer would be written again at the end
        before, rest = file.tell(), f"{line}\n".encode()
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            file.truncate(before)
            if not before:
                path.unlink()
            raise
