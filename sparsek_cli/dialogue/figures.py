"""Figures of a conversation: tokens, bytes and seconds, as measured and as text."""

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from sparsek_cli.byte_units import size


@dataclass
class Stats:
    """The figures of the status line; bytes count one conversation, all layers."""

    context_tokens: int
    kv_bytes: int
    dense_kv_bytes: int
    tokens_per_second: float
    reply_tokens: int
    first_token_seconds: float = 0.0
    reply_at_limit: bool = False  # it has as many tokens as it may, and perhaps no end


class Clock:
    """Seconds to the first token of the last reply, from its question on; tokens per second."""

    def __init__(self) -> None:
        self.tokens, self._start, self.first, self.seconds = 0, time.perf_counter(), 0.0, 0.0

    def timed(self, tokens: Iterable[int]) -> Iterator[int]:
        """The same tokens, each counted when it comes."""
        for token in tokens:
            self.tokens += 1
            self.seconds = time.perf_counter() - self._start
            self.first = self.first or self.seconds
            yield token

    @property
    def rate(self) -> float:
        """Of the tokens after the first, which waits for the question to be read."""
        writing = self.seconds - self.first
        return (self.tokens - 1) / writing if writing else 0.0


def status_line(stats: Stats, *, sparse: bool, limit: int | None = None) -> str:
    """One line: context used, KV bytes now, what dense would hold, tokens per second."""
    context = f"{stats.context_tokens:,} tokens"
    if limit and stats.context_tokens > limit:
        context += f" (made for {limit:,})"
    parts = [context, f"KV {size(stats.kv_bytes)}"]
    if sparse and stats.context_tokens:
        parts.append(f"dense {size(stats.dense_kv_bytes)}")
        # Before the slots are full dense holds less: no gain to show yet.
        if 0 < stats.kv_bytes < stats.dense_kv_bytes:
            parts[-1] += f" ({stats.dense_kv_bytes / stats.kv_bytes:.1f}x)"
    elif not sparse:
        parts[-1] += " (dense, grows)"
    if stats.tokens_per_second:
        parts.append(f"{stats.tokens_per_second:.1f} tokens/s")
    if stats.first_token_seconds:
        parts.append(f"first token {stats.first_token_seconds:.2f} s")
    return "  |  ".join(parts)


def beyond(fed: int, limit: int | None, *, stretches: bool) -> str | None:
    """What to say of a context longer than a model was made for; None where it is not.

    Args:
        limit: `Engine.context_limit`. stretches: whether the model's positions can be stretched.
    """
    if not limit or fed <= limit:
        return None
    said = f"the context is longer than the {limit:,} tokens that this model was made for"
    advice = f"; if it reads badly, start with --yarn {math.ceil(fed / limit)}"
    return said + advice if stretches else said
