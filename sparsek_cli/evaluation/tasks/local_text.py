"""Which local text a task reads: what the user named, else what is on every machine."""

import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sparsek_cli.data.text.documents import iterate_texts
from sparsek_cli.errors import SparsekError
from sparsek_cli.evaluation.tasks.local_files import as_they_are
from sparsek_cli.output.tokenizer_files import files_in

MIN_SOURCE_BYTES = 40_000  # of a Python source that may stand in for text; shorter ones say little


def named_text(settings: Mapping[str, Any]) -> list[str]:
    """Files the user named for text: `--text`, else DIR/text under `--data`; may be empty.

    Args:
        settings: a task's metadata; the keys `text` and `data` are looked at.
    """
    if settings.get("text"):
        return [str(item) for item in settings["text"]]
    folder = Path(settings["data"]) / "text" if settings.get("data") else None
    return [str(folder)] if folder is not None and folder.is_dir() else []


def text_as_it_is(settings: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """The files of `named_text`, `as_they_are`: what is made of them is kept by this."""
    from sparsek_cli.data.text.find_files import find_files

    named = named_text(settings)
    return as_they_are(find_files(named)) if named else []


def documents(settings: Mapping[str, Any]) -> Iterator[str]:
    """The documents of `named_text`, else the longer sources of this Python's standard library."""
    files = named_text(settings)
    if files:
        yield from iterate_texts(files)
        return
    library = Path(sysconfig.get_path("stdlib"))
    for file in sorted(library.glob("*.py")):
        if file.stat().st_size >= MIN_SOURCE_BYTES:
            yield file.read_text(encoding="utf-8", errors="replace")


def tokenizer_of(settings: Mapping[str, Any]) -> Any:
    """The tokenizer that sizes a task's prompts, loaded once per process while its files stay.

    lm-eval hands tasks the model's arguments under `tokenizer` or `pretrained`.
    """
    return _tokenizer(str(settings.get("tokenizer") or settings["pretrained"]))


_LOADED: dict[tuple, Any] = {}  # all of them stay: what is made by one is known by its id


def _tokenizer(name: str) -> Any:
    key = (name, *as_they_are(files_in(Path(name).absolute())))
    if key not in _LOADED:
        from sparsek_cli.loading import load_open_tokenizer

        _LOADED[key] = load_open_tokenizer(name)
    return _LOADED[key]


class WrongLength(SparsekError):
    """A task that cannot be made at one length; at others it may be."""


def lengths_of(settings: Mapping[str, Any]) -> list[int]:
    """Prompt lengths asked for, in tokens: `max_seq_lengths` as in lm-eval's RULER, else 4096."""
    given = settings.get("max_seq_lengths") or [4096]
    return [int(n) for n in (given if isinstance(given, list | tuple) else [given])]
