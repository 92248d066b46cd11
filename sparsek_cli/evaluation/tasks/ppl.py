"""The `ppl` task: how well the model predicts long text, and where in it.

Each document is one running passage of a given number of tokens. lm-eval asks for the
log-likelihood of the whole passage; our model class hands back a number that also carries that of
each token (`TokenLogLikelihood`), from which the last quarter and the loss by position come. Under
another model class the total is the same and those two are absent.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from sparsek_cli.evaluation.tasks.local_text import WrongLength, documents, lengths_of, tokenizer_of

BINS = 32  # positions are averaged over this many equal spans
CHARACTERS_PER_TOKEN = 8  # more than any text needs; one slice is then nearly always enough
SPARE = 1.1  # a passage may take so many times the characters of a document's first
GOLDEN_RATIO = (5**0.5 - 1) / 2
MAX_PASSAGES = 4  # from one document, so that a single long one does not speak for all text


class TokenLogLikelihood(float):
    """The log-likelihood of a text (nats), with that of each of its tokens in `tokens`."""

    tokens: np.ndarray

    def __new__(cls, tokens: np.ndarray, total: float) -> "TokenLogLikelihood":
        self = super().__new__(cls, total)
        self.tokens = tokens
        return self

    def __reduce__(self) -> tuple:
        return TokenLogLikelihood, (self.tokens, float(self))


def dataset(**settings: Any) -> dict:
    """The passages as lm-eval wants them: {"test": Dataset of text, tokens, length}.

    Args:
        settings: the task's metadata: tokenizer, max_seq_lengths, text, data, limit, seed and the
            `sparsek` block.
    """
    from datasets import Dataset

    count = settings.get("limit") or settings["sparsek"]["documents"]
    rows = []
    for length in lengths_of(settings):
        found = list(_passages(settings, length, count))
        if not found:
            raise WrongLength(
                f"no document in the text is {length:,} tokens long",
                hint="name longer text with --text, or a smaller --lengths",
            )
        rows += found
    return {"test": Dataset.from_list(rows)}


def _passages(settings: dict[str, Any], length: int, count: int) -> Iterator[dict[str, Any]]:
    """At most `count` different passages, first one of each document, then a second one, ..."""
    tokenizer = tokenizer_of(settings)
    texts = []
    for text in documents(settings):
        if len(text) >= length:  # a token has at least one character
            texts.append(text)
        if len(texts) >= count:
            break
    rng = np.random.default_rng([settings.get("seed") or 0, length])
    first = rng.random(len(texts))
    cut = set()
    for turn in range(MAX_PASSAGES):
        for number, text in enumerate(texts):
            if len(cut) == count:
                return
            # Far from the earlier ones, however many follow: passages should share little.
            where = (first[number] + turn * GOLDEN_RATIO) % 1
            passage = _cut(tokenizer, text, length, float(where))
            if passage is not None and (number, passage.start) not in cut:
                cut.add((number, passage.start))
                yield {"text": passage.text, "tokens": passage.tokens, "length": length}


class _Passage(NamedTuple):
    start: int
    text: str
    tokens: int


def _cut(tokenizer: Any, text: str, length: int, where: float) -> _Passage | None:
    """A passage of at most `length` tokens (nearly always exactly), or None where it is too short.

    Args:
        where: 0 for the start of the text, 1 for the last passage it has room for.
    """
    first = _passage(tokenizer, text, length, 0)
    if first is None:
        return None
    # Tokens are longer in some places than in others; where the end has too few, take the start.
    last = len(text) - int(len(first.text) * SPARE)
    start = text.find(" ", int(where * last)) + 1 if last > 0 else 0
    return (_passage(tokenizer, text, length, start) if start else None) or first


def _passage(tokenizer: Any, text: str, length: int, start: int) -> _Passage | None:
    """The passage from character `start` on.

    Cut at token bounds; the first tokens may merge differently without what stood before them, so
    the count is taken again and what is too much is cut off.
    """
    piece = text[start : start + length * CHARACTERS_PER_TOKEN]
    for _ in range(8):
        encoded = tokenizer(piece, return_offsets_mapping=True, verbose=False)
        tokens = len(encoded["input_ids"])
        if tokens <= length:
            return _Passage(start, piece, tokens) if tokens >= length - 16 else None
        piece = piece[: encoded["offset_mapping"][length - 1][1]]
    return None


def process_results(doc: dict[str, Any], results: Sequence[float]) -> dict[str, tuple]:
    """(log-likelihood, tokens) of the passage and of its last quarter."""
    [total] = results
    scores = {"ppl": (float(total), doc["tokens"])}
    if isinstance(total, TokenLogLikelihood):
        quarter = total.tokens[len(total.tokens) * 3 // 4 :]
        scores["ppl_last_quarter"] = (float(quarter.sum(dtype=np.float64)), len(quarter))
    return scores


def perplexity(items: Sequence[tuple[float, int]]) -> float:
    """exp of the mean loss per token over all passages."""
    total, tokens = (sum(column) for column in zip(*items, strict=True))
    return float(np.exp(-total / tokens))


def _standard_error(items: Sequence[tuple[float, int]]) -> float | None:
    """Of `perplexity`, by the delta method from the passages' mean losses; None for one passage."""
    if len(items) < 2:
        return None
    losses = [-total / tokens for total, tokens in items]
    return float(np.std(losses, ddof=1) / len(losses) ** 0.5) * perplexity(items)


perplexity.standard_error = _standard_error


def loss_by_position(passages: Sequence[TokenLogLikelihood], length: int) -> dict[str, list]:
    """Mean loss (nats per token) over equal spans of positions.

    Returns:
        `position`: the middle of each span, in tokens; `loss`: its mean loss; spans without a token
        are left out.
    """
    edges = np.linspace(0, length, BINS + 1)
    total, count = np.zeros(BINS), np.zeros(BINS)
    for passage in passages:
        which = np.digitize(np.arange(len(passage.tokens)), edges[1:-1])
        total += np.bincount(which, -passage.tokens, BINS)
        count += np.bincount(which, minlength=BINS)
    kept = count > 0
    middle = (edges[1:] + edges[:-1]) / 2
    return {
        "position": [round(float(x), 1) for x in middle[kept]],
        "loss": [round(float(x), 6) for x in total[kept] / count[kept]],
    }
