"""From q.k to weights: what a family's attention does to logits, beyond the scale that all have.

Gemma 2 caps them softly; gpt-oss has one further logit per head in the softmax, attention to
nothing. The converted layers leave that to the kernels (`Logits.settings`). Layers that slide,
dense attention of the same model, calibration and rival policies use what is here, so that all of
them mean the same weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F


@dataclass(frozen=True)
class Logits:
    """How weights are made of q.k.

    Attributes:
        scale: factor of q.k.
        softcap: the scaled logit x becomes softcap * tanh(x / softcap).
        sinks: [H], one further logit per head, whose weight carries no value.
    """

    scale: float
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        query: torch.Tensor,
        scaling: float | None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> Logits:
        """What a family hands to its attention function with `query` [..., D]."""
        return cls(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, sinks)

    @classmethod
    def given(cls, query: torch.Tensor, arguments: Mapping[str, Any]) -> Logits:
        """The same from the keyword arguments of an attention function."""
        return cls.of(query, *(arguments.get(name) for name in ("scaling", "softcap", "s_aux")))

    @property
    def plain(self) -> bool:
        """Whether torch's own attention computes them."""
        return self.softcap is None and self.sinks is None

    @property
    def settings(self) -> dict[str, Any]:
        """The same as arguments of `sparsek_attention`."""
        return {"scale": self.scale, "softcap": self.softcap, "sink_logits": self.sinks}

    def capped(self, logits: torch.Tensor) -> torch.Tensor:
        """Scaled logits with the cap on them."""
        return logits if self.softcap is None else (logits / self.softcap).tanh() * self.softcap

    def log_total(self, logits: torch.Tensor) -> torch.Tensor:
        """log of the softmax' denominator: [..., G, heads of a group, R, 1] of [..., R, keys]."""
        total = logits.logsumexp(-1, keepdim=True)
        if self.sinks is None:
            return total
        return torch.logaddexp(total, self.sinks.to(total.dtype).view(*logits.shape[-4:-2], 1, 1))

    def weights(self, logits: torch.Tensor) -> torch.Tensor:
        """Attention weights, float32, of capped and masked logits [..., G, heads, R, keys]."""
        if self.sinks is None:
            return logits.softmax(-1, dtype=torch.float32)
        logits = logits.float()
        return (logits - self.log_total(logits)).exp()


def masked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seen: torch.Tensor,
    logits: Logits,
) -> torch.Tensor:
    """Attention to the keys that `seen` marks: torch's, or written out where that knows too little.

    Args:
        query: [B, H, N, D]. key, value: [B, G, M, D]. seen: bool [N, M] or [B, 1 or H, N, M].

    Returns:
        [B, H, N, D].
    """
    if logits.plain:
        options = {"scale": logits.scale, "enable_gqa": True}
        return F.scaled_dot_product_attention(query, key, value, attn_mask=seen, **options)
    grouped = query.unflatten(1, (key.shape[1], -1))  # [B, G, h, N, D]
    scaled = (grouped @ key[:, :, None].transpose(-1, -2)).float() * logits.scale
    if seen.dim() == 4:
        shared = seen.shape[1] == 1
        seen = seen[:, :, None] if shared else seen.unflatten(1, grouped.shape[1:3])
    # The least number, not -inf: padding that sees nothing must not become NaN.
    hidden = logits.capped(scaled).masked_fill(~seen, torch.finfo(torch.float32).min)
    out = logits.weights(hidden).to(value.dtype) @ value[:, :, None]
    return out.flatten(1, 2)
