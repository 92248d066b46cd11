"""Tokenised documents: one flat array on disk, mapped into every process that reads it."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from sparsek_cli.data.pieces import Encoder, ids_of, safe_cut, told
from sparsek_cli.data.text.documents import iterate_texts
from sparsek_cli.data.text.find_files import find_files, is_hub_id
from sparsek_cli.errors import SparsekError, UsageError

BATCH = 64  # documents per tokenizer call; it works on them in parallel
# Characters of a document that is tokenised at once. The call cannot be interrupted, nor seen.
PIECE = 1 << 20
SILENCE = 15.0  # seconds between lines that say how far it is
_LOOKED_AT = 1 << 20  # tokens
_MUCH_UNKNOWN = 0.1
# How text becomes tokens. Raise it with every change of that: none kept from before is taken then.
READING = 2
LOCK_PATIENCE = 1800.0  # seconds to wait for another process that tokenises the same text


class Corpus:
    """Documents as token ids.

    Attributes:
        tokens: [T] uint16 or uint32, all documents one after the other; may be a memory map.
        starts, ends: [D] int64, where each document lies in `tokens`.
        numbers: [D] which documents of the source, in reading order, these are.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        starts: np.ndarray,
        ends: np.ndarray,
        numbers: np.ndarray | None = None,
    ):
        self.tokens, self.starts, self.ends = tokens, starts, ends
        self.numbers = np.arange(len(starts)) if numbers is None else numbers
        self._cumulative = np.cumsum(ends - starts)

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def total(self) -> int:
        """Tokens in all documents."""
        return int(self._cumulative[-1]) if len(self) else 0

    def document(self, index: int) -> np.ndarray:
        """Token ids of one document, int64."""
        return self.tokens[self.starts[index] : self.ends[index]].astype(np.int64)

    def slice(self, rng: np.random.Generator, length: int) -> np.ndarray:
        """`length` running tokens from a random place, int64 [length].

        Documents are drawn by their length; short ones are joined until there is enough.
        """
        parts, missing = [], length
        while missing > 0:
            at = int(rng.integers(self.total))
            index = int(np.searchsorted(self._cumulative, at, side="right"))
            start, end = int(self.starts[index]), int(self.ends[index])
            latest = max(end - missing, start)
            begin = int(rng.integers(start, latest + 1))
            parts.append(self.tokens[begin : min(begin + missing, end)].astype(np.int64))
            missing -= len(parts[-1])
        return np.concatenate(parts)

    def split(self, share: float, seed: int) -> tuple["Corpus", "Corpus"]:
        """(training, held out): whole documents, about `share` of the tokens, at least one.

        A single document is cut near its end instead.
        """
        if len(self) == 1:
            cut = int(self.ends[0] - max(1, round(share * self.total)))
            middle = np.array([cut])
            return (
                Corpus(self.tokens, self.starts, middle),
                Corpus(self.tokens, middle, self.ends),
            )
        order = np.random.default_rng(seed).permutation(len(self))
        lengths = (self.ends - self.starts)[order]
        count = int(np.searchsorted(np.cumsum(lengths), share * self.total)) + 1
        held = np.sort(order[: min(count, len(self) - 1)])
        kept = np.setdiff1d(np.arange(len(self)), held)
        return self._only(kept), self._only(held)

    def _only(self, which: np.ndarray) -> "Corpus":
        return Corpus(self.tokens, self.starts[which], self.ends[which], self.numbers[which])


def build_corpus(
    texts: Iterable[str],
    tokenizer: Any,
    *,
    max_tokens: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [T] and ends [D] of the documents, each closed by the end-of-text token if any."""
    dtype = np.uint16 if ids_of(tokenizer) <= 1 << 16 else np.uint32
    parts: list[np.ndarray] = []
    ends: list[int] = []
    total = 0
    pace = _Pace(say)
    for batch in _batches(iter(texts)):
        for ids in _encode(tokenizer, batch, pace):
            if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
                ids = [*ids, tokenizer.eos_token_id]
            parts.append(np.asarray(ids, dtype=dtype))
            total += len(ids)
            ends.append(total)
            if max_tokens is not None and total >= max_tokens:
                return np.concatenate(parts), np.asarray(ends)
    if not parts:
        raise UsageError("there is no text to train on", hint="name files that hold some")
    return np.concatenate(parts), np.asarray(ends)


class _Pace:
    """Says now and then how far tokenising is."""

    def __init__(self, say: Callable[[str], None]):
        self._say, self._last, self._done = say, time.monotonic(), 0

    def advance(self, characters: int) -> None:
        self._done += characters
        if time.monotonic() - self._last >= SILENCE:
            self._last = time.monotonic()
            self._say(f"tokenised {self._done / 1e6:,.0f} million characters")


def _encode(tokenizer: Any, batch: list[str], pace: _Pace) -> Iterator[list[int]]:
    """Token ids of whole documents, on all cores: elsewhere threads are off, texts being short."""
    short = [text for text in batch if len(text) <= PIECE]
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "true"
    try:
        # verbose=False: documents longer than the model's context are expected here.
        found = short and tokenizer(short, return_attention_mask=False, verbose=False)["input_ids"]
    finally:
        # Never unset: a tokenizer that has used threads warns at the next fork.
        os.environ[name] = before or "false"
    ready = iter(found)
    for text in batch:
        if len(text) > PIECE:
            yield _encode_long(tokenizer, text, pace)
        else:
            pace.advance(len(text))
            yield next(ready)


def _encode_long(tokenizer: Any, text: str, pace: _Pace) -> list[int]:
    """Ids of one document, read piece by piece; cut at spaces, where there are any."""
    encode, ids, start = Encoder(tokenizer), [], 0
    while start < len(text):
        piece = text[start : start + PIECE]
        if start + PIECE < len(text):
            piece = piece[: safe_cut(piece, 0)]
        ids += encode(piece, first=start == 0, plain=True)
        start += len(piece)
        pace.advance(len(piece))
    return ids


def load_corpus(
    spec: str | list[str],
    tokenizer: Any,
    *,
    name: str | None = None,
    split: str = "train",
    column: str | None = None,
    max_tokens: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Corpus:
    """Reads and tokenises what `spec` means (see `iterate_texts`), once: the result is cached.

    The cache lies in $SPARSEK_CACHE_DIR, else in the XDG cache directory; its key covers files
    (path, size, time of change), tokenizer, settings and `READING`. Several processes share one
    result.
    """
    where = {"name": name, "split": split, "column": column}
    key = _key(spec, tokenizer, {**where, "max_tokens": max_tokens})
    file = cache_folder() / key
    kept = _kept(file)
    if kept is None:
        with _locked(file):
            kept = _kept(file)
            if kept is None:
                if file.is_dir():
                    say(f"tokenised text in {file} is damaged: it is made anew")
                    shutil.rmtree(file)
                say(f"tokenising {spec if isinstance(spec, str) else ', '.join(spec)}")
                if tokenizer.eos_token_id is None:
                    say("the tokenizer has no end-of-text token: documents end without one")
                texts = iterate_texts(spec, column=column, name=name, split=split)
                kept = build_corpus(texts, tokenizer, max_tokens=max_tokens, say=say)
                _store(file, *kept)
                kept = _kept(file) or kept
    tokens, ends = kept
    _say_unknown(tokens[:_LOOKED_AT], tokenizer, say)
    return Corpus(tokens, np.concatenate([[0], ends[:-1]]), ends)


def _say_unknown(tokens: np.ndarray, tokenizer: Any, say: Callable[[str], None]) -> None:
    """A text that is mostly one token teaches and measures nothing, and its loss looks fine."""
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        return  # byte-level tokenizers name one that they never give
    share = float(np.mean(tokens == unknown))
    if share > _MUCH_UNKNOWN:
        say(
            f"{share:.0%} of the text's tokens are {tokenizer.unk_token}: the tokenizer does not "
            "know them, or is not the model's"
        )


def _kept(file: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """Tokens and ends in the cache; None where they are not there, or not whole."""
    try:
        tokens = np.load(file / "tokens.npy", mmap_mode="r")
        ends = np.load(file / "ends.npy")
    except (OSError, ValueError, EOFError):
        return None
    whole = (
        (tokens.ndim, ends.ndim, tokens.dtype.kind, ends.dtype.kind) == (1, 1, "u", "i")
        and len(ends) > 0
        and ends[-1] == len(tokens)
        and bool((np.diff(ends, prepend=0) >= 0).all())
    )
    return (tokens, ends) if whole else None


def cache_folder() -> Path:
    """Where tokenised text is kept; safe to delete at any time."""
    own = os.environ.get("SPARSEK_CACHE_DIR")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return (Path(own) if own else Path(base) / "sparsek") / "tokens"


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """One process at a time makes `file`, in a cache that is made first.

    Raises:
        SparsekError: the cache cannot be written, or the other process takes too long.
    """
    # The system lets go of it when its holder dies, however it dies.
    lock = FileLock(file.with_suffix(".lock"), timeout=LOCK_PATIENCE)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        held = lock.acquire()
    except Timeout as error:
        raise SparsekError(
            f"another process has been tokenising the same text for {LOCK_PATIENCE / 60:.0f} "
            f"minutes ({lock.lock_file})",
            hint="wait until it is done, or end it",
        ) from error
    except OSError as error:
        raise SparsekError(
            f"tokenised text cannot be kept in {file.parent}: {error.strerror or error}",
            hint="set SPARSEK_CACHE_DIR to a folder that can be written and has room",
        ) from error
    with held:
        yield


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    while batch := list(islice(texts, BATCH)):
        yield batch


def _key(spec: str | list[str], tokenizer: Any, settings: dict) -> str:
    if is_hub_id(spec):
        source: Any = str(spec)
    else:
        stats = [(str(f.resolve()), f.stat()) for f in find_files(spec)]
        source = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
    ends = [tokenizer.eos_token_id, len(tokenizer)]
    text = json.dumps([READING, source, settings, told(tokenizer), ends], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _store(file: Path, tokens: np.ndarray, ends: np.ndarray) -> None:
    for left in file.parent.glob(f"{file.name}.*.part"):
        shutil.rmtree(left)  # of a killed run: this one holds the lock
    part = file.with_suffix(f".{os.getpid()}.part")
    try:
        part.mkdir()
        np.save(part / "tokens.npy", tokens)
        np.save(part / "ends.npy", ends)
        part.replace(file)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
