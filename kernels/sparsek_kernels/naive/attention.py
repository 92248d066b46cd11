"""sparsek_attention from its definition: N x N masks, a prefix at a time, plain autograd."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsek_kernels.naive.operator import naive_threshold


def naive_selection(effective: Tensor, k: int, window: int, sinks: int) -> Tensor:
    """[N, N] bool: key j (column) is selected for query t (row), for one head's scores [N]."""
    n = effective.shape[0]
    chosen = torch.zeros(n, n, dtype=torch.bool)
    for t in range(n):
        last = t - window
        order = sorted(range(sinks, last + 1), key=lambda j: (-float(effective[j]), j))
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
        for h in range(heads):
            g = h // (heads // groups)
            e = effective[b, g]
            chosen = naive_selection(e.detach(), topk[g], window, sinks)
            rows = []
            for i in range(n):
                prefix = e[sinks : max(i - window + 1, sinks)]
                if topk[g] == 0 or prefix.numel() <= topk[g]:
                    rows.append(torch.ones_like(e))
                else:
                    rows.append((e - naive_threshold(prefix, topk[g])).clamp(0, 1))
            m = torch.where(chosen, torch.stack(rows), 1.0)
            visible = always | chosen
            logits = q[b, h] @ k[b, g].T * scale
            if gate == "straight_through":
                logits = logits + (m - m.detach())
                m = torch.ones_like(m)
            elif gate == "log":
                # Twice `where`: the gradient of log at a hidden zero must not be NaN.
                logits = logits + torch.where(visible, m, 1.0).log()
                m = torch.ones_like(m)
            else:
                logits = logits * m
            weights = logits.masked_fill(~visible, -torch.inf).softmax(-1)
            out.append((weights * m) @ v[b, g])
    return torch.stack(out).view(batch, heads, n, dim)
