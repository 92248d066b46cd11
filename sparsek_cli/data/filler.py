"""Text that facts are hidden in, cut into sentences of token ids."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from sparsek_cli.data.corpus import Corpus

# The end of a sentence: closing punctuation and quotes, with a capital after the white space.
_SENTENCE_END = re.compile(
    r"(?<!\bMr)(?<!\bMrs)(?<!\bDr)(?<!\bSt)[.!?][\"”’')\]]*(?=\s+[\"“‘'(\[]?[A-Z])"
)
_ENCODE_BATCH = 20_000
# Lists, tables and scripts that end sentences otherwise are cut all the same: a "sentence" of a
# whole document would make a sample of any size.
_MOST_CHARACTERS, _MOST_TOKENS = 2000, 500
_PIECE = re.compile(rf"(?s).{{1,{_MOST_CHARACTERS - 1}}}(?=\s|$)|.{{{_MOST_CHARACTERS}}}|.+")


@dataclass
class Filler:
    """Documents cut into sentences of token ids.

    Flat arrays, not lists of strings, so that forked data workers share the memory.

    Attributes:
        ids: [tokens] integers, all documents; may be a memory map.
        starts, ends: [sentences] int64, where each sentence (with the white space before it) lies.
        documents: [documents + 1] int64, where each document starts, in sentences.
        tokenizer: what the ids mean.
        text: the sentences joined, or "" where only ids are known: then text is decoded from ids,
            exact for byte-level tokenizers.
        characters: [sentences + 1] int64, where each sentence starts in `text`.
    """

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    documents: np.ndarray
    tokenizer: Any = field(repr=False)
    text: str = field(default="", repr=False)
    characters: np.ndarray | None = None

    @classmethod
    def from_documents(cls, texts: Iterable[str], tokenizer: Any) -> Filler:
        """Cut and tokenise `texts`; ValueError when they hold no text."""
        pieces: list[str] = []
        bounds = [0]
        for text in texts:
            pieces.extend(split_sentences(text))
            bounds.append(len(pieces))
        if not pieces:
            raise ValueError("the filler documents hold no text")
        rows: list[list[int]] = []
        for start in range(0, len(pieces), _ENCODE_BATCH):
            rows.extend(encode(tokenizer, pieces[start : start + _ENCODE_BATCH]))
        tokens = _starts(rows)
        return cls(
            ids=np.fromiter((i for row in rows for i in row), dtype=np.int32),
            starts=tokens[:-1],
            ends=tokens[1:],
            documents=np.unique(bounds).astype(np.int64),
            tokenizer=tokenizer,
            text="".join(pieces),
            characters=_starts(pieces),
        )

    @classmethod
    def from_corpus(cls, corpus: Corpus, tokenizer: Any) -> Filler:
        """The same from a tokenised corpus, without decoding it."""
        closes, opens = _sentence_marks(tokenizer)
        starts: list[np.ndarray] = []
        ends: list[np.ndarray] = []
        documents = [0]
        for begin, end in zip(corpus.starts.tolist(), corpus.ends.tolist(), strict=True):
            tokens = np.asarray(corpus.tokens[begin:end])
            if tokens[-1] == tokenizer.eos_token_id:
                tokens = tokens[:-1]
            cuts = np.flatnonzero(closes[tokens[:-1]] & opens[tokens[1:]]) + 1
            cuts = _no_longer(cuts, len(tokens))
            starts.append(begin + np.concatenate([[0], cuts]))
            ends.append(begin + np.concatenate([cuts, [len(tokens)]]))
            documents.append(documents[-1] + len(cuts) + 1)
        return cls(
            ids=corpus.tokens,
            starts=np.concatenate(starts).astype(np.int64),
            ends=np.concatenate(ends).astype(np.int64),
            documents=np.asarray(documents, dtype=np.int64),
            tokenizer=tokenizer,
        )

    def take(self, rng: np.random.Generator, tokens: int) -> np.ndarray:
        """Indices of consecutive sentences of one document, at most `tokens` tokens in all.

        Starts anywhere from which the document is long enough; a document shorter than that is
        gone through again from its start. At least one sentence.
        """
        begins, stops = self.starts[self.documents[:-1]], self.ends[self.documents[1:] - 1]
        room = np.maximum(stops - begins - tokens, 1).astype(np.float64)
        which = int(rng.choice(len(room), p=room / room.sum()))
        first, last = int(self.documents[which]), int(self.documents[which + 1])
        length = int(stops[which] - begins[which])
        if length > tokens:
            offset = int(begins[which]) + int(rng.integers(0, length - tokens))
            start = first + int(np.searchsorted(self.starts[first:last], offset, side="right")) - 1
            limit = self.starts[start] + tokens
            stop = first + int(np.searchsorted(self.ends[first:last], limit, side="right"))
            return np.arange(start, max(stop, start + 1))
        chosen = np.tile(np.arange(first, last), 1 + tokens // max(1, length))
        sizes = np.cumsum(self.ends[chosen] - self.starts[chosen])
        return chosen[: max(1, int(np.searchsorted(sizes, tokens, side="right")))]

    def sentence_text(self, index: int) -> str:
        if self.characters is None:
            return self.tokenizer.decode(self.sentence_ids(index))
        return self.text[self.characters[index] : self.characters[index + 1]]

    def sentence_ids(self, index: int) -> np.ndarray:
        return self.ids[self.starts[index] : self.ends[index]]


def split_sentences(text: str) -> list[str]:
    """`text` cut before the white space that follows a sentence; joined again it is `text`.

    What is longer than any sentence is cut where it has white space, else anywhere.
    """
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    cuts = [0, *ends, len(text)]
    pieces = [text[a:b] for a, b in zip(cuts, cuts[1:], strict=False) if b > a]
    return [
        part
        for piece in pieces
        for part in (_PIECE.findall(piece) if len(piece) > _MOST_CHARACTERS else [piece])
    ]


def _no_longer(cuts: np.ndarray, total: int) -> np.ndarray:
    """Cuts of `total` tokens with further ones where they are too far apart."""
    bounds = np.concatenate([[0], cuts, [total]])
    wide = np.flatnonzero(np.diff(bounds) > _MOST_TOKENS)
    more = [np.arange(bounds[i] + _MOST_TOKENS, bounds[i + 1], _MOST_TOKENS) for i in wide]
    return np.sort(np.concatenate([cuts, *more])).astype(np.int64)


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens."""
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]


def _sentence_marks(tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Per token id: whether it may close a sentence, and whether it may open one. [V] bool each."""
    texts = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    closes = [re.search(r"[.!?][\"”’')\]]*$", text) is not None for text in texts]
    opens = [re.match(r"\s+([\"“‘'(\[]?[A-Z]|[\"“‘'(\[]?$)", text) is not None for text in texts]
    special = list(tokenizer.all_special_ids)
    closes, opens = np.asarray(closes), np.asarray(opens)
    closes[special] = opens[special] = False
    return closes, opens


def _starts(rows: Sequence[Any]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
