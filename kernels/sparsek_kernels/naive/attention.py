"""sparsek_attention from its definition: N x N masks, a prefix at a time, plain autograd."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsek_kernels.naive.operator import naive_gates, naive_threshold


def naive_selection(effective: Tensor, k: int, window: int, sinks: int) -> Tensor:
    """[N, N] bool: key j (column) is selected for query t (row), for one head's scores [N].

    A score of -inf is never selected.
    """
    n, values = effective.shape[0], effective.tolist()
    chosen = torch.zeros(n, n, dtype=torch.bool)
    for t in range(n):
        last = t - window
        candidates = (j for j in range(sinks, last + 1) if values[j] > -math.inf)
        order = sorted(candidates, key=lambda j: (-values[j], j))
        chosen[t, order[:k]] = True
    return chosen


def naive_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scores: Tensor,
    *,
    topk,
    window: int,
    sinks: int = 0,
    slopes: Tensor | None = None,
    gate: str = "straight_through",
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    stand_ins: Tensor | None = None,
) -> Tensor:
    """Twin of sparsek_attention without documents or state; float64, [B, H, N, D]."""
    batch, heads, n, dim = q.shape
    groups = k.shape[1]
    topk = [topk] * groups if isinstance(topk, int) else list(topk)
    scale = 1 / math.sqrt(dim) if scale is None else scale
    q, k, v = (x.to(torch.float64) for x in (q, k, v))
    position = torch.arange(n)
    effective = scores.to(torch.float64)
    if slopes is not None:
        effective = effective + slopes.to(torch.float64)[:, None] * position
    t, j = position[:, None], position[None, :]
    always = (j <= t) & ((j < sinks) | (j > t - window))
    out = []
    for b in range(batch):
        for g in range(groups):
            e = effective[b, g]
            chosen = naive_selection(e.detach(), topk[g], window, sinks)
            visible = always | chosen
            gates = torch.where(chosen, _gates(e, topk[g], window, sinks), 1.0)
            for h in range(g * heads // groups, (g + 1) * heads // groups):
                logits, m = q[b, h] @ k[b, g].T * scale, gates
                if softcap is not None:
                    logits = softcap * (logits / softcap).tanh()
                if gate == "straight_through":
                    logits = logits + (m - m.detach())
                elif gate == "log":
                    # Hidden gates are zero; their log must not reach the gradient as NaN.
                    logits = logits + torch.where(visible, m, 1.0).log()
                else:
                    logits = logits * m
                logits = logits.masked_fill(~visible, -torch.inf)
                if sink_logits is not None:
                    nothing = sink_logits[h].to(torch.float64).expand(n, 1)
                    logits = torch.cat([logits, nothing], 1)
                if stand_ins is not None:
                    parts = stand_ins[h].to(torch.float64).split([dim, dim, 1, 1], 1)
                    key, value, bias, limit = parts
                    gone = (position + 1 - (sinks + topk[g] + window)).clamp(min=0)
                    many = gone.double().log()[:, None].minimum(limit.detach().T)
                    theirs = q[b, h] @ key.T * scale + bias.T + many
                    logits = torch.cat([logits, theirs], 1)
                weights = logits.softmax(-1)
                seen = weights[:, :n] @ v[b, g] if gate != "kv" else (weights[:, :n] * m) @ v[b, g]
                if stand_ins is not None:
                    seen = seen + weights[:, -len(value) :] @ value
                out.append(seen)
    return torch.stack(out).view(batch, heads, n, dim)


def _gates(effective: Tensor, k: int, window: int, sinks: int) -> Tensor:
    """[N, N]: row t holds clip(e - tau_t, 0, 1), tau_t over the candidates of query t."""
    rows = []
    for t in range(effective.shape[0]):
        prefix = effective[sinks : max(t - window + 1, sinks)]
        prefix = prefix[prefix > -torch.inf]
        if k == 0 or prefix.numel() <= k:
            rows.append(torch.ones_like(effective))
        else:
            rows.append(naive_gates(effective, naive_threshold(prefix, k)))
    return torch.stack(rows)
