"""One shape to measure, and random data for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shape:
    """An attention layer and its budget of keys per KV head."""

    heads: int
    kv_heads: int
    head_dim: int
    topk: int
    window: int
    sinks: int
    batch: int
    gate: str
    dtype: torch.dtype
    device: torch.device
    seed: int

    @property
    def budget(self) -> dict:
        return {"topk": self.topk, "window": self.window, "sinks": self.sinks, "gate": self.gate}

    def keys(self, length: int) -> float:
        """Keys a query sees, averaged over the queries of a sequence."""
        most = self.sinks + self.topk + self.window
        if length <= most:
            return (length + 1) / 2
        return (most * (most + 1) / 2 + (length - most) * most) / length

    def ideal(self, length: int) -> float:
        """Speed-up over dense attention if time followed the number of keys."""
        return (length + 1) / 2 / self.keys(length)

    def operations(self, length: int, *, backward: bool) -> float:
        """Floating-point operations of the sparse attention: 2 products forward, 5 backward."""
        products = 7 if backward else 2
        pairs = self.keys(length) * length * self.batch * self.heads
        return products * 2 * self.head_dim * pairs


@dataclass
class Data:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scores: torch.Tensor

    def leaves(self) -> list[torch.Tensor]:
        return [self.q, self.k, self.v, self.scores]


def draw(shape: Shape, length: int, *, grad: bool = False) -> Data:
    """q [B, H, N, D], k and v [B, G, N, D], scores float32 [B, G, N] with spread 2."""
    generator = torch.Generator(shape.device).manual_seed(shape.seed)

    def random(*size: int, dtype: torch.dtype = shape.dtype) -> torch.Tensor:
        out = torch.randn(*size, generator=generator, device=shape.device, dtype=dtype)
        return out.requires_grad_(grad)

    size = (length, shape.head_dim)
    return Data(
        random(shape.batch, shape.heads, *size),
        random(shape.batch, shape.kv_heads, *size),
        random(shape.batch, shape.kv_heads, *size),
        (2 * random(shape.batch, shape.kv_heads, length, dtype=torch.float32))
        .detach()
        .requires_grad_(grad),
    )
