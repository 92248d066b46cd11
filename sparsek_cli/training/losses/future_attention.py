"""Scores learn what to keep from the future attention of the pass that they decide about.

Selection hides what a dropped key would have been worth, so losses on the model's output never
bring it back. But every query and key of the model's own pass is there: at some queries of each
document, the largest attention that later queries would give each key (as calibration measures it,
see conversion/calibrate/scorers/targets.py) says which keys a head should still hold. Scores are
pulled to the right side of the threshold that its budget sets among them, keys near it most.
Nothing of it reaches hidden states, and attention sees scores as constants. Layers that read keys
of another one pull at that one's scores, each by its own queries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from sparsek_cli.conversion.calibrate.recorded import Reading, Recorded
from sparsek_cli.conversion.calibrate.scorers.ridge import SPREAD
from sparsek_cli.conversion.calibrate.scorers.targets import FLOOR, look
from sparsek_cli.data import ANSWER
from sparsek_cli.models.attention.registration import replaced_attention
from sparsek_cli.models.attention.sharing import layer_of_scores
from sparsek_cli.models.config import ATTENTION, LayerBudget, layer_budget
from sparsek_cli.models.logits import Logits

# Queries looked at, per document, beside those that predict an answer.
ROWS = 256
# Queries of a document at which it is asked what a head should hold.
_MOMENTS = 8
# From so many nats beside the threshold on, a mistake weighs no more.
_CLEAR = 2.0
# Keys whose score is so far from the threshold still pull; further away hardly.
_NEAR = 2 * SPREAD


@dataclass(frozen=True)
class Aims:
    """What the heads of one layer should hold of documents of one length, at T of their queries.

    Attributes:
        documents: how many there are, D; the heads of the first come first.
        weights: [T, D * G, N] float32: above 0 for keys to hold, below for those to drop, 0 for
            those that do not count; both kinds add up to 1/2 where there are any.
        candidates: [T, 1, N] bool, keys that compete at each query.
        last: [D * G, 1] int64, rank of the last key that is held.
    """

    documents: int

    weights: torch.Tensor
    candidates: torch.Tensor
    last: torch.Tensor


class FutureAttention:
    """The loss of a model's scores at the border of what is kept; see the top of the file."""

    needs_teacher = False

    def __init__(self) -> None:
        self._aims: dict[int, list[Aims | None]] = {}
        self._losses: dict[int, torch.Tensor] = {}
        self._documents: list[list[tuple[int, int]]] = []
        self._answers = torch.empty(0)
        self._batch = 0

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Around everything that trains, backward passes too: checkpointing attends again there."""
        with replaced_attention(ATTENTION, self._watched):
            yield

    def begin(self, roles: torch.Tensor, bounds: torch.Tensor | None) -> None:
        """Before the model's pass over one batch.

        Args:
            roles: [B, N]. bounds: int32 [documents + 1] over all B * N tokens; None: one per row.
        """
        self._batch = len(roles)
        self._documents = alike(documents_of(roles, bounds))
        self._answers = asking_rows(roles)
        self._aims, self._losses = {}, {}

    def loss(self) -> torch.Tensor:
        """Sum over sequences of the mean over layers, float32; after the pass."""
        return torch.stack([*self._losses.values()]).mean()

    def _watched(self, attend: Callable) -> Callable:
        def watched(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
            scores = kwargs.get("sparsek_scores")
            if scores is not None and module.training and self._documents:
                slopes, layer = kwargs["sparsek_slopes"].detach(), module.layer_idx
                if layer not in self._aims:
                    logits = Logits.given(query, kwargs)
                    budget = layer_budget(module.config, layer_of_scores(module, kwargs))
                    self._aims[layer] = self._look(budget, query, key, logits)
                with torch.autocast(scores.device.type, enabled=False):
                    loss = self._layer(scores, slopes, self._aims[layer])
                self._losses.setdefault(layer, loss)
                kwargs["sparsek_scores"], kwargs["sparsek_slopes"] = scores.detach(), slopes
            return attend(module, query, key, value, mask, **kwargs)

        return watched

    @torch.no_grad()
    def _look(
        self, budget: LayerBudget, query: torch.Tensor, key: torch.Tensor, logits: Logits
    ) -> list[Aims | None]:
        found = []
        with torch.autocast(query.device.type, enabled=False):
            for group in self._documents:
                sinks = None if logits.sinks is None else logits.sinks.repeat(len(group))
                queries, keys = _stacked(query, group), _stacked(key, group)
                recorded = Recorded(None, queries, keys, None, replace(logits, sinks=sinks))
                asking = torch.stack([self._answers[start:end] for start, end in group])
                found.append(aims(recorded, asking, budget))
        return found

    def _layer(
        self, scores: torch.Tensor, slopes: torch.Tensor, wanted: list[Aims | None]
    ) -> torch.Tensor:
        """Sum over sequences of scores [B, G, N] against what is wanted of each document."""
        # Of a layer that has nothing to drop the gradient is 0, and there: DDP waits for it.
        total = scores.float().sum() * 0
        for group, aim in zip(self._documents, wanted, strict=True):
            if aim is not None:
                own = _stacked(scores, group)
                share = own.shape[1] / scores.shape[2]
                total = total + share * border_loss(own, slopes.repeat(len(group)), aim)
        return total


def documents_of(roles: torch.Tensor, bounds: torch.Tensor | None) -> list[tuple[int, int]]:
    """First token and end of each document, over all tokens of roles [B, N]."""
    batch, length = roles.shape
    ends = range(0, batch * length + 1, length) if bounds is None else bounds.tolist()
    return [(a, b) for a, b in zip(ends, ends[1:], strict=False) if b > a]


def alike(documents: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """The documents by their length: on a GPU many are looked at as fast as one."""
    by_length: dict[int, list[tuple[int, int]]] = {}
    for start, end in documents:
        by_length.setdefault(end - start, []).append((start, end))
    return list(by_length.values())


def asking_rows(roles: torch.Tensor) -> torch.Tensor:
    """[B * N] bool on the CPU: tokens after which an answer's token comes."""
    asking = torch.zeros_like(roles, dtype=torch.bool)
    asking[:, :-1] = roles[:, 1:] == ANSWER
    return asking.flatten().cpu()


def _stacked(tensor: torch.Tensor, documents: list[tuple[int, int]]) -> torch.Tensor:
    """[documents * heads, N, ...]: documents of N tokens, cut from [B, heads, length, ...]."""
    length = tensor.shape[2]
    return torch.cat([
        tensor[start // length, :, start % length : start % length + end - start]
        for start, end in documents
    ])  # fmt: skip


def looked_at(answer: torch.Tensor, first: int, count: int = ROWS) -> torch.Tensor:
    """Evenly spread queries from `first` on and all that answer, [R] int64 ascending.

    Args:
        answer: [N] bool on the CPU.
    """
    tokens = len(answer)
    spread = torch.linspace(first, tokens - 1, min(count, tokens - first)).round().long()
    return torch.cat([spread, first + answer[first:].nonzero().squeeze(1)]).unique()


def aims(recorded: Recorded, asking: torch.Tensor, budget: LayerBudget) -> Aims | None:
    """What later queries of documents say that heads should hold; None where all of it fits.

    Args:
        recorded: D documents of N tokens in one layer, as the heads of one: [D * H, N, size].
        asking: [D, N] bool on the CPU, queries of each document that are always looked at.
    """
    documents, tokens = asking.shape
    device, window, sinks = recorded.key.device, budget.window, budget.sinks
    groups = len(recorded.key) // documents
    topk = budget.topk if isinstance(budget.topk, tuple) else (budget.topk,) * groups
    # The first query at which some head has one candidate more than it can hold.
    first = sinks + window + min((k for k in topk if k), default=tokens)
    if first >= tokens:
        return None
    moments = torch.linspace(first, tokens, _MOMENTS + 1).long()[:-1].unique()
    rows = looked_at(asking.any(0), first)
    everywhere = torch.isin(rows, looked_at(torch.zeros(tokens, dtype=torch.bool), first))
    seen = _ByMoment(
        torch.searchsorted(moments, rows, right=True) - 1, asking[:, rows] | everywhere,
        recorded.key,
    )  # fmt: skip
    nothing = torch.zeros(tokens, dtype=torch.bool)
    look(Reading(recorded, rows, None), nothing, tokens, window, seen, seen)
    # Of all later queries: those of later parts too.
    worth = seen.result().flip(0).cummax(0).values.flip(0)

    keys, moments = torch.arange(tokens, device=device), moments.to(device)[:, None, None]
    candidates = (keys >= sinks) & (keys <= moments - window)
    held = torch.tensor(topk, device=device)[:, None].repeat(documents, 1)
    counts = (held > 0) & (held < candidates.sum(-1, keepdim=True))
    last = (held - 1).clamp(0, tokens - 1)  # a head may have slots for more than the document
    worth = worth.masked_fill(~candidates, -torch.inf)
    (border,) = _ranked(worth, last)
    weight = (worth - border).clamp(-_CLEAR, _CLEAR)
    weight = torch.where(candidates & counts, weight, 0)
    sides = (weight.clamp_min(0), weight.clamp_max(0))
    more, less = (side / (2 * side.abs().sum(-1, keepdim=True)).clamp_min(1e-9) for side in sides)
    return Aims(documents, more + less, candidates, last)


class _ByMoment:
    """The largest probability that the queries of each of T parts of a document give a key."""

    def __init__(self, parts: torch.Tensor, asked: torch.Tensor, key: torch.Tensor):
        """Of R queries of D documents.

        Args:
            parts: [R] int64 on the CPU, ascending: the part of each query.
            asked: [D, R] bool on the CPU: whose query counts.
            key: [D * G, N, size].
        """
        self._parts, self._asked = parts, asked
        self._groups = len(key) // len(asked)
        self._seen = 0
        shape = int(parts[-1]) + 1, *key.shape[:2]
        self._best = torch.full(shape, FLOOR, device=key.device)

    def add(self, logits: torch.Tensor) -> None:
        these = slice(self._seen, self._seen + logits.shape[2])
        here, asked = self._parts[these], self._asked[:, these]
        self._seen = these.stop
        largest = logits.amax(1)
        if not bool(asked.all()):
            silent = (~asked).repeat_interleave(self._groups, 0).to(largest.device)
            largest = largest.masked_fill(silent[..., None], -torch.inf)
        parts, counts = here.unique_consecutive(return_counts=True)
        pieces = largest.split(counts.tolist(), 1)
        for part, piece in zip(parts.tolist(), pieces, strict=True):
            best = self._best[part, :, : logits.shape[-1]]
            torch.maximum(best, piece.amax(1), out=best)

    def result(self) -> torch.Tensor:
        """[T, D * G, N] float32."""
        return self._best


def border_loss(scores: torch.Tensor, slopes: torch.Tensor, wanted: Aims) -> torch.Tensor:
    """Sum over documents of the weighted share of keys on the wrong side of the threshold.

    Of a document it is the mean over heads and queries, and the share is a smooth one: a sigmoid
    as wide as some spreads of the scores.

    Args:
        scores: [D * G, N]. slopes: [D * G].
    """
    places = torch.arange(scores.shape[1], device=scores.device)
    effective = scores.float() + slopes.float()[:, None] * places
    known = effective.detach().masked_fill(~wanted.candidates, -torch.inf)
    after = (wanted.last + 1).clamp_max(scores.shape[1] - 1)
    inside, outside = _ranked(known, wanted.last, after)
    # Between the last that is held and the first that is not, where there are both.
    border = torch.where(outside > -torch.inf, (inside + outside) / 2, inside)
    border = border.masked_fill(border == -torch.inf, 0)
    # Beyond reach on the wrong side, as old keys are where a slope is steep, a key pulls no more.
    beside = wanted.weights.sign() * (effective - border) / _NEAR
    losses = _NEAR * (-beside).sigmoid() * wanted.weights.abs()
    counts = (wanted.weights != 0).any(-1)
    sums, numbers = (x.unflatten(1, (wanted.documents, -1)).flatten(2).sum((0, 2))
                     for x in (losses, counts))  # fmt: skip
    return (sums / numbers.clamp_min(1)).sum()


def _ranked(values: torch.Tensor, *ranks: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """[T, G, 1] each: of values [T, G, N] those at each head's ranks [G, 1]; 0 is the largest."""
    order = values.sort(-1, descending=True).values
    return tuple(order.gather(-1, rank.expand(len(values), -1, -1)) for rank in ranks)
