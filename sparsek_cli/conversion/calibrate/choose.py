"""Which map and slope each KV head gets: the one with the smallest error after W_o.

On held-out sequences, for a sample of queries, attention over exactly the keys that a candidate
would keep is compared with dense attention, multiplied by W_o. Selection follows the definition
(top-k of the prefix, exact), so what is measured is what the converted model will do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsek_cli.conversion.calibrate.collect import Recorded

# Elements of the largest temporaries: masks [candidates, G, rows, N] and logits [H, rows, N].
_MASKS = 1 << 26
_LOGITS = 1 << 27


@dataclass(frozen=True)
class Budget:
    """Slots per KV head."""

    topk: int
    window: int
    sinks: int


def visible(effective: torch.Tensor, rows: torch.Tensor, budget: Budget) -> torch.Tensor:
    """Keys that each query sees: sinks, window, and the topk best candidates of its prefix.

    Args:
        effective: [S, N] float64, one line per candidate and KV head.
        rows: [R] int64 queries.
        budget: the slots.

    Returns:
        [S, R, N] bool.
    """
    tokens = effective.shape[-1]
    positions = torch.arange(tokens, device=effective.device)
    joined = (positions[None] >= budget.sinks) & (positions[None] <= rows[:, None] - budget.window)
    # Stable: of equal scores the earlier token comes first, as in the kernels.
    order = effective.sort(dim=-1, descending=True, stable=True).indices
    ranked = joined[:, order].transpose(0, 1)
    kept = ranked & (ranked.cumsum(-1, dtype=torch.int32) <= budget.topk)
    selected = torch.zeros_like(kept).scatter_(-1, order[:, None].expand_as(kept), kept)
    recent = (positions[None] <= rows[:, None]) & (positions[None] > rows[:, None] - budget.window)
    first = (positions[None] < budget.sinks) & (positions[None] <= rows[:, None])
    return selected | (recent | first)[None]


def output_errors(
    recorded: Recorded,
    effective: torch.Tensor,
    rows: torch.Tensor,
    budget: Budget,
    out_weight: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared error after W_o of every candidate, per KV head and query.

    Args:
        recorded: one sequence in one layer.
        effective: [C, G, N] float64, each candidate's scores u + slope * position.
        rows: [R] int64 queries.
        budget: slots.
        out_weight: [H * D, hidden] float32.

    Returns:
        Errors [C, G, R] and the dense output's energy [G, R], both float32.
    """
    heads, tokens, _ = recorded.query.shape
    # Rows of W_o by KV head: the error of a group's heads is added up before it is squared.
    out_weight = out_weight.view(recorded.key.shape[0], -1, out_weight.shape[-1])
    parts = [
        _block_errors(recorded, effective, block, budget, out_weight)
        for block in rows.split(max(1, _LOGITS // (heads * tokens)))
    ]
    errors, energy = zip(*parts, strict=True)
    return torch.cat(errors, dim=-1), torch.cat(energy, dim=-1)


def _block_errors(
    recorded: Recorded,
    effective: torch.Tensor,
    rows: torch.Tensor,
    budget: Budget,
    out_weight: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`output_errors` of a few rows; out_weight [G, heads of the group * D, hidden]."""
    heads, _, size = recorded.query.shape
    groups, tokens, _ = recorded.key.shape
    query = recorded.query[:, rows].float() * recorded.scaling
    query = query.reshape(groups, heads // groups * len(rows), size)
    logits = torch.matmul(query, recorded.key.float().transpose(1, 2))
    logits = logits.view(groups, heads // groups, len(rows), tokens)
    positions = torch.arange(tokens, device=rows.device)
    logits.masked_fill_(positions > rows[:, None], -torch.inf)
    weights = logits.softmax(-1)
    # A column of ones: its weighted sum is what the kept weights must be divided by.
    value = torch.nn.functional.pad(recorded.value.float(), (0, 1), value=1.0)

    def attend(weights: torch.Tensor) -> torch.Tensor:
        """[G, Q, R, N] -> [G, Q, R, D]."""
        output = torch.matmul(weights.flatten(1, 2), value).view(*weights.shape[:3], size + 1)
        return output[..., :size] / output[..., size:].clamp_min(1e-20)

    def project(output: torch.Tensor) -> torch.Tensor:
        """[G, Q, R, D] -> squared length after W_o, [G, R]."""
        joined = output.transpose(1, 2).reshape(groups, len(rows), -1)
        return torch.matmul(joined, out_weight).square().sum(-1)

    dense = attend(weights)
    energy = project(dense)
    errors = []
    step = max(1, _MASKS // (groups * len(rows) * tokens))
    for chunk in effective.split(step):
        seen = visible(chunk.flatten(0, 1), rows, budget).view(*chunk.shape[:2], len(rows), tokens)
        for mask in seen:
            errors.append(project(attend(weights * mask[:, None]) - dense))
    return torch.stack(errors), energy
