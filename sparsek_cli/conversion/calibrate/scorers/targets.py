"""Regression targets of scores: the attention that later queries will give each key.

The target is the log of the largest attention probability that any later query outside the
window, in any head of the group, gives the key (method.md section 5); or of their mean, or of a
percentile. Computed over blocks of queries: no N x N tensor exists, but for the percentile.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch

from sparsek_cli.conversion.calibrate.recorded import Reading, Recorded

# Most queries in a block, by the kind of device (calls are dear on others than CPUs), and most
# logits in it: 512 MB in float32.
_BLOCK = {"cpu": 64, "other": 2048}
_LOGITS = 1 << 27
# Log probabilities below this mean "never looked at"; without a floor they dominate the squares.
FLOOR = -16.0


def future_attention(
    recorded: Recorded, rows: torch.Tensor, answer: torch.Tensor, window: int, target: str = "max"
) -> tuple[torch.Tensor, torch.Tensor]:
    """log attention probability per key over the given queries beyond the window, reduced.

    Args:
        recorded: one sequence in one layer, and queries of all that read its keys.
        rows: [R] int64, ascending: the queries looked at.
        answer: [N] bool, queries that count in the second result.
        window: keys closer than this to a query do not count there.
        target: how queries and the group's heads become one number: a key of `REDUCTIONS`.

    Returns:
        Two [G, C] float32 tensors, at least `FLOOR`, for the C keys of the context: over all
        `rows`, over those in `answer`.
    """
    groups, device = recorded.key.shape[0], recorded.key.device
    best, best_answer = (REDUCTIONS[target](groups, recorded.context, device) for _ in range(2))
    for reading in recorded.readings(rows.cpu()):
        asked = reading.of(answer.to(device)).cpu()
        for one in reading.recorded.by_reader():
            own = replace(reading, recorded=one)
            look(own, asked, recorded.context, window, best, best_answer)
    return best.result(), best_answer.result()


def look(
    reading: Reading,
    answer: torch.Tensor,
    context: int,
    window: int,
    best: Reduction,
    best_answer: Reduction,
) -> None:
    """Adds what the queries of one reading see of the context; answer [tokens] bool.

    Where rows and `answer` are on the CPU, a GPU is never waited for.
    """
    recorded = reading.recorded
    heads, _, size = recorded.query.shape
    groups, tokens, _ = recorded.key.shape
    key = recorded.key.float()
    most = _BLOCK["cpu" if key.device.type == "cpu" else "other"]
    for block in reading.rows.split(max(1, min(most, _LOGITS // (heads * tokens)))):
        last, where = int(block[-1]) + 1, _span(block, key.device)
        query = (recorded.query[:, where].float() * recorded.logits.scale).reshape(groups, -1, size)
        logits = torch.matmul(query, key[:, :last].transpose(1, 2))
        logits = recorded.logits.capped(logits.view(groups, heads // groups, len(block), last))
        columns = torch.arange(last, device=key.device)
        first, places = int(block[0]) + 1, torch.arange(tokens, device=key.device)[where, None]
        # Only columns after the first query can lie in some query's future.
        late = columns[first:] > places
        logits[..., first:].masked_fill_(late, -torch.inf)
        logits -= recorded.logits.log_total(logits)
        near = max(0, int(block[0]) - window + 1)
        logits[..., near:].masked_fill_(columns[near:] > places - window, -torch.inf)
        logits = logits[..., :context]
        best.add(logits)
        asked = answer[block].nonzero()[:, 0]
        if len(asked):
            best_answer.add(logits[:, :, _span(asked, key.device)])


def _span(rows: torch.Tensor, device: torch.device) -> slice | torch.Tensor:
    """Ascending rows as an index: a slice, for which a GPU waits for nothing, where they adjoin."""
    first, stop = int(rows[0]), int(rows[-1]) + 1
    return slice(first, stop) if stop - first == len(rows) else rows.to(device)


class Reduction(Protocol):
    """Many queries' attention to the same keys becomes one number per KV head and key."""

    def add(self, logits: torch.Tensor) -> None:
        """Log probabilities [G, heads of the group, R, keys]; -inf where a query does not count."""

    def result(self) -> torch.Tensor:
        """[G, keys] float32."""


class _Max:
    """The largest probability that any query in any head gives a key."""

    def __init__(self, groups: int, tokens: int, device: torch.device):
        self._best = torch.full((groups, tokens), FLOOR, device=device)

    def add(self, logits: torch.Tensor) -> None:
        best = self._best[:, : logits.shape[-1]]
        torch.maximum(best, logits.amax((1, 2)), out=best)

    def result(self) -> torch.Tensor:
        return self._best


class _Mean:
    """The mean probability over the queries that count and the heads."""

    def __init__(self, groups: int, tokens: int, device: torch.device):
        self._sum = torch.zeros(groups, tokens, device=device)
        self._count = torch.zeros_like(self._sum)

    def add(self, logits: torch.Tensor) -> None:
        keys = logits.shape[-1]
        self._sum[:, :keys] += logits.exp().sum((1, 2))
        self._count[:, :keys] += (logits > -torch.inf).sum((1, 2))

    def result(self) -> torch.Tensor:
        return (self._sum / self._count.clamp_min(1)).log().clamp_min(FLOOR)


class _Percentile99:
    """What 1 in 100 of the queries that count exceeds; a query's best head speaks for it.

    Holds all R x N probabilities of a KV head at once.
    """

    def __init__(self, groups: int, tokens: int, device: torch.device):
        self._shape = (groups, tokens)
        self._rows = [torch.full((groups, 1, tokens), -torch.inf, device=device)]

    def add(self, logits: torch.Tensor) -> None:
        best = logits.amax(1)
        missing = self._shape[1] - best.shape[-1]
        self._rows.append(torch.nn.functional.pad(best, (0, missing), value=-torch.inf))

    def result(self) -> torch.Tensor:
        rows = torch.cat(self._rows, 1).sort(dim=1, descending=True).values
        rank = (rows > -torch.inf).sum(1, keepdim=True) // 100
        return rows.gather(1, rank)[:, 0].clamp_min(FLOOR)


REDUCTIONS = {"max": _Max, "mean": _Mean, "p99": _Percentile99}
