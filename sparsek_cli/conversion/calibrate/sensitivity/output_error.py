"""Sensitivity of one layer: the error of its attention output after W_o, by KV head.

On held-out sequences, for a sample of queries, attention over exactly the keys that a candidate
would keep is compared with dense attention, multiplied by W_o. Selection follows the definition
(top-k of the prefix, exact), so what is measured is what the converted model will do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from sparsek_cli.conversion.calibrate.recorded import Recorded
from sparsek_cli.conversion.calibrate.sensitivity.kept_sums import KeptSums

# Elements of the largest temporaries: masks [candidates, G, rows, N], logits [H, rows, N], weights
# [G, candidates * sizes, H / G, rows, N].
_MASKS = 1 << 26
_LOGITS = 1 << 27
_WEIGHTS = 1 << 27


@dataclass(frozen=True)
class Slots:
    """Slots per KV head that every candidate shares, and the sizes of topk to compare."""

    window: int
    sinks: int
    sizes: tuple[int, ...]


def prefix_ranks(effective: torch.Tensor, rows: torch.Tensor, slots: Slots) -> torch.Tensor:
    """Rank of each key among the candidates of each query's prefix; 1 is the best.

    Args:
        effective: [S, N] float64, one line per candidate map and KV head.
        rows: [R] int64 queries.
        slots: window and sinks.

    Returns:
        [S, R, N] int32; keys that are no candidates have the largest int32.
    """
    positions = torch.arange(effective.shape[-1], device=effective.device)
    joined = (positions >= slots.sinks) & (positions <= rows[:, None] - slots.window)
    # Stable: of equal scores the earlier token comes first, as in the kernels.
    order = effective.sort(dim=-1, descending=True, stable=True).indices
    ranked = joined[:, order].transpose(0, 1)
    ranks = ranked.cumsum(-1, dtype=torch.int32)
    ranks.masked_fill_(~ranked, torch.iinfo(torch.int32).max)
    return torch.empty_like(ranks).scatter_(-1, order[:, None].expand_as(ranks), ranks)


def always_visible(tokens: int, rows: torch.Tensor, slots: Slots) -> torch.Tensor:
    """Sinks and window of each query: [R, N] bool."""
    positions = torch.arange(tokens, device=rows.device)
    recent = positions > rows[:, None] - slots.window
    return (positions <= rows[:, None]) & (recent | (positions < slots.sinks))


def output_errors(
    recorded: Recorded,
    effective: torch.Tensor,
    rows: torch.Tensor,
    slots: Slots,
    out_weight: torch.Tensor,
) -> torch.Tensor:
    """Squared error after W_o of every candidate, per KV head and query.

    Args:
        recorded: one sequence in one layer.
        effective: [C, G, N] float64, each candidate's scores u + slope * position.
        rows: [R] int64 queries.
        slots: window, sinks and the L sizes of topk.
        out_weight: [H * D, hidden] float32.

    Returns:
        Errors [C, L, G, R] float32.
    """
    heads, tokens, _ = recorded.query.shape
    # Rows of W_o by KV head: the error of a group's heads is added up before it is squared.
    out_weight = out_weight.view(recorded.key.shape[0], -1, out_weight.shape[-1])
    parts = [
        _block_errors(recorded, effective, block, slots, out_weight)
        for block in rows.split(max(1, _LOGITS // (heads * tokens)))
    ]
    return torch.cat(parts, dim=-1)


def _block_errors(
    recorded: Recorded,
    effective: torch.Tensor,
    rows: torch.Tensor,
    slots: Slots,
    out_weight: torch.Tensor,
) -> torch.Tensor:
    """`output_errors` of a few rows; out_weight [G, heads of the group * D, hidden]."""
    heads, _, size = recorded.query.shape
    groups, tokens, _ = recorded.key.shape
    query = recorded.query[:, rows].float() * recorded.logits.scale
    query = query.reshape(groups, heads // groups * len(rows), size)
    logits = torch.matmul(query, recorded.key.float().transpose(1, 2))
    logits = recorded.logits.capped(logits.view(groups, heads // groups, len(rows), tokens))
    positions = torch.arange(tokens, device=rows.device)
    logits.masked_fill_(positions > rows[:, None], -torch.inf)
    weights = recorded.logits.weights(logits)
    # What a sink logit takes of a query's attention is there whatever is kept.
    nothing = weights.new_zeros(())
    if recorded.logits.sinks is not None:
        nothing = (1 - weights.sum(-1, keepdim=True)).clamp_min(0)[:, None]
    # A column of ones: its weighted sum is what the kept weights must be divided by.
    value = torch.nn.functional.pad(recorded.value.float(), (0, 1), value=1.0)

    def divided(sums: torch.Tensor) -> torch.Tensor:
        """[G, L, Q, R, D + 1] -> [G, L, Q, R, D]."""
        return sums[..., :size] / (sums[..., size:] + nothing).clamp_min(1e-20)

    def project(output: torch.Tensor) -> torch.Tensor:
        """[G, L, Q, R, D] -> squared length after W_o, [L, G, R]."""
        joined = output.transpose(2, 3).flatten(3).flatten(1, 2)
        lengths = torch.matmul(joined, out_weight).square().sum(-1)
        return lengths.view(groups, -1, len(rows)).transpose(0, 1)

    sums = _sums_in_order if rows.device.type == "cpu" else _sums_by_masks
    dense, kept = sums(weights, value, effective, rows, slots)
    dense = divided(dense[:, None])
    errors = [project(divided(some) - dense) for some in kept]
    return torch.cat(errors).unflatten(0, (len(effective), len(slots.sizes)))


# What a query's attention adds up to, not yet divided: dense [G, Q, R, D + 1], and with candidates
# and their sizes, some at a time, [G, some, Q, R, D + 1].
_Sums = tuple[torch.Tensor, Iterator[torch.Tensor]]


def _sums_in_order(
    weights: torch.Tensor,
    value: torch.Tensor,
    effective: torch.Tensor,
    rows: torch.Tensor,
    slots: Slots,
) -> _Sums:
    """The least arithmetic, in many small calls: for a CPU."""
    seen = always_visible(weights.shape[-1], rows, slots)
    candidates = (rows - slots.window + 1 - slots.sinks).clamp_min(0)
    kept = KeptSums(weights, value, seen, candidates, slots.sinks, torch.tensor(slots.sizes))
    return kept.dense, map(kept.of, effective)


def _sums_by_masks(
    weights: torch.Tensor,
    value: torch.Tensor,
    effective: torch.Tensor,
    rows: torch.Tensor,
    slots: Slots,
) -> _Sums:
    """Few large calls, and nothing to wait for: for an accelerator."""
    groups, tokens = value.shape[:2]

    def sums(some: torch.Tensor) -> torch.Tensor:
        """[G, L, Q, R, N] -> [G, L, Q, R, D + 1]."""
        return torch.matmul(some.flatten(1, 3), value).view(*some.shape[:4], -1)

    def kept() -> Iterator[torch.Tensor]:
        always = always_visible(tokens, rows, slots)
        sizes = torch.tensor(slots.sizes, device=rows.device)[:, None, None]
        together = max(1, _WEIGHTS // weights.numel())
        step = max(1, _MASKS // (groups * len(rows) * tokens))
        for chunk in effective.split(step):
            ranks = prefix_ranks(chunk.flatten(0, 1), rows, slots)
            ranks = ranks.view(len(chunk), groups, len(rows), tokens).transpose(0, 1).contiguous()
            for some in ranks.split(max(1, together // len(sizes)), dim=1):  # [G, C, R, N]
                for few in sizes.split(together):
                    seen = (some[:, :, None] <= few) | always  # [G, C, L, R, N]
                    yield sums(weights[:, None] * seen.flatten(1, 2)[:, :, None])

    return sums(weights[:, None])[:, 0], kept()
