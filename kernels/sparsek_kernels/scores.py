"""Effective scores: the one number per key and head that every comparison is made on."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = torch.finfo(torch.float64).max


def comparable(effective: Tensor) -> Tensor:
    """float64 scores of any kind as numbers that have one order: NaN as -inf, +inf as `LARGEST`.

    Inside, +inf marks sinks, which no budget counts: of a score it would overfill lists of keys,
    as NaN, which is neither below nor above a number, could.
    """
    return effective.nan_to_num(nan=-torch.inf, posinf=LARGEST, neginf=-torch.inf)


def effective_scores(scores: Tensor, slopes: Tensor | None, positions: Tensor | None) -> Tensor:
    """e_j = u_j + slope * j in float64 (derived: an age preference is still a static score).

    Computed once and used by selection, gates, gradients and the decoder's state, so that all of
    them order keys alike: float32 would lose the scores beside a large slope * j.

    Args:
        scores: [B, G, N], any floating dtype.
        slopes: [G] or None.
        positions: [N] or [B, N] integers, counted from the start of the document; None without
            slopes.

    Returns:
        [B, G, N] float64, -inf or finite (see `comparable`), differentiable in scores and slopes.
    """
    effective = scores.to(torch.float64)
    if slopes is None:
        return comparable(effective)
    if positions.dim() == 2:
        positions = positions[:, None, :]
    # Two rounded operations, never a fused one: prefill and decode must agree bit for bit.
    return comparable(effective + slopes.to(torch.float64)[:, None] * positions.to(torch.float64))
