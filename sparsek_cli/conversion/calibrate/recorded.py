"""What the attention of one layer sees of one sequence, and dense and sliding attention over it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from sparsek_cli.models.block_attention import causal_attention, sliding_attention
from sparsek_cli.models.logits import Logits, masked_attention


@dataclass(frozen=True)
class Reader:
    """A layer that attends to the keys of another one.

    Attributes:
        layer: its number. query: [H, N, D]. stream: [N] float32, energy of its input.
    """

    layer: int
    query: torch.Tensor
    stream: torch.Tensor


@dataclass(frozen=True)
class Recorded:
    """One sequence in one layer: a context, and turns that each continue from its end.

    Attributes:
        inputs: [N, hidden], what the attention block (and so the scorer) reads.
        query: [H, N, D]; key, value: [G, N, D], positions already encoded.
        logits: how weights are made of query and key.
        turns, turn_length: the last turns * turn_length tokens are that many turns, each of which
            sees the context and itself, and not the others.
        readers: later layers that attend to these keys with queries of their own.
    """

    inputs: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    logits: Logits
    turns: int = 0
    turn_length: int = 0
    readers: tuple[Reader, ...] = ()

    def by_reader(self) -> Iterator[Recorded]:
        """The same keys with the queries of each layer that reads them, their own first."""
        yield replace(self, readers=())
        for reader in self.readers:
            yield replace(self, query=reader.query, readers=())

    @property
    def context(self) -> int:
        """Tokens of the context."""
        return self.key.shape[1] - self.turns * self.turn_length

    @property
    def positions(self) -> torch.Tensor:
        """[N] int64, places of tokens in their reading: every turn goes on from the context."""
        places = torch.arange(self.key.shape[1], device=self.key.device)
        context = self.context
        beyond = context + (places - context) % max(1, self.turn_length)
        return torch.where(places < context, places, beyond)

    def readings(self, rows: torch.Tensor) -> Iterator[Reading]:
        """The plain sequences that `rows` [R] int64, ascending, belong to: context first."""
        if not self.turns:
            yield Reading(self, rows, None)
            return
        device, context = self.key.device, self.context
        owner = (rows - context).div(self.turn_length, rounding_mode="floor").clamp_min(-1)
        for turn in owner.unique_consecutive().tolist():
            index = torch.arange(context, device=device)
            local = rows[owner == turn]
            if turn >= 0:
                first = context + turn * self.turn_length
                own = torch.arange(first, first + self.turn_length, device=device)
                index, local = torch.cat([index, own]), local - turn * self.turn_length
            plain = Recorded(
                self.inputs[index], self.query[:, index], self.key[:, index],
                self.value[:, index], self.logits,
                readers=tuple(
                    replace(one, query=one.query[:, index], stream=one.stream[index])
                    for one in self.readers
                ),
            )  # fmt: skip
            yield Reading(plain, local, index)

    def split(self, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[heads, N, ...] as the context [1, heads, C, ...] and turns [T, heads, M, ...]."""
        context, rest = tensor[None, :, : self.context], tensor[:, self.context :]
        return context, rest.unflatten(1, (self.turns, self.turn_length)).transpose(0, 1)

    def join(self, context: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        """Undoes `split`."""
        return torch.cat([context[0], turns.transpose(0, 1).flatten(1, 2)], 1)


@dataclass(frozen=True)
class Reading:
    """A context and at most one turn as one plain sequence.

    Attributes:
        recorded: of its tokens. rows: [R] int64 queries in it.
        index: [tokens] int64, its tokens in the whole recording; None: all of them.
    """

    recorded: Recorded
    rows: torch.Tensor
    index: torch.Tensor | None

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """[..., N] of the whole recording as [..., tokens] of this reading."""
        return tensor if self.index is None else tensor[..., self.index]


# From a recording to what attention puts out, [H, N, D].
Attend = Callable[[Recorded], torch.Tensor]


def dense_attention(recorded: Recorded) -> torch.Tensor:
    """[H, N, D]: causal, each turn seeing the context and itself."""
    if not recorded.turns:
        parts = (x[None] for x in (recorded.query, recorded.key, recorded.value))
        return causal_attention(*parts, recorded.logits)[0]
    (query, queries), (key, keys), (value, values) = (
        recorded.split(x) for x in (recorded.query, recorded.key, recorded.value)
    )
    out = causal_attention(query, key, value, recorded.logits)
    keys, values = (
        torch.cat([context.expand(len(turns), -1, -1, -1), turns], 2)
        for context, turns in ((key, keys), (value, values))
    )
    length, context = recorded.turn_length, recorded.context
    seen = torch.ones(length, context + length, dtype=torch.bool, device=out.device).tril(context)
    return recorded.join(out, masked_attention(queries, keys, values, seen, recorded.logits))


def sliding(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int,
    logits: Logits,
    turns: int,
    length: int,
) -> torch.Tensor:
    """Attention of a layer that slides, [1, H, N, D]; arguments [1, heads, N, D]."""
    if not turns:
        return sliding_attention(query, key, value, window=window, logits=logits)
    end = query.shape[2] - turns * length
    parts = [(x[:, :, :end], x[0, :, end:].unflatten(1, (turns, length)).transpose(0, 1))
             for x in (query, key, value)]  # fmt: skip
    context = sliding_attention(*(part[0] for part in parts), window=window, logits=logits)
    # A turn sees the end of the context and itself.
    tails = [part[0][:, :, max(0, end - window + 1) :].expand(turns, -1, -1, -1)
             for part in parts[1:]]  # fmt: skip
    keys, values = (
        torch.cat([tail, part[1]], 2) for tail, part in zip(tails, parts[1:], strict=True)
    )
    told = sliding_attention(parts[0][1], keys, values, window=window, logits=logits)
    return torch.cat([context, told.transpose(0, 1).flatten(1, 2)[None]], 2)
