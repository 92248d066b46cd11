"""One linear map of a model with what stands around it, by torch and by our kernels."""

from __future__ import annotations

import torch
from sparsek_kernels.triton import linears
from sparsek_kernels.triton.linears import Norm, Scorer, Shape, shapes
from torch.nn import functional as F


class Place:
    """One map of the model and what stands around it, with one copy of its weights.

    Args:
        name: "qkv", "out", "gate and up", "down" or "head".
    """

    def __init__(self, name: str, rows: int, size: dict[str, int], dtype, device, seed: int):
        draw = torch.Generator(device).manual_seed(seed)

        def new(*shape: int, kind=dtype) -> torch.Tensor:
            made = torch.randn(*shape, generator=draw, device=device)
            return (made / shape[-1] ** 0.5 if len(shape) > 1 else made).to(kind)

        hidden, wide, dim = size["hidden_size"], size["intermediate_size"], size["head_dim"]
        heads, groups = size["num_attention_heads"] * dim, size["num_key_value_heads"] * dim
        columns, outputs = {
            "qkv": (hidden, (heads, groups, groups)),
            "out": (heads, (hidden,)),
            "gate and up": (hidden, (wide, wide)),
            "down": (wide, (hidden,)),
            "head": (hidden, (size["vocab_size"],)),
        }[name]
        self.name, self.dim = name, dim
        self.x = 4 * new(rows, columns)
        self.maps = tuple((new(count, columns), None) for count in outputs)
        self.norm = Norm(1 + new(columns), 1e-5)
        self.residual = new(rows, outputs[0])
        angle = torch.rand(rows, dim // 2, generator=draw, device=device).repeat(1, 2)
        self.turn = angle.cos().to(dtype), angle.sin().to(dtype)
        count = groups // dim
        self.scorer = Scorer(*(new(*s, kind=torch.float32) for s in ((count, columns), (count,))))
        self.key = (shapes.rows_class(rows), columns, sum(outputs))

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for weight, _ in self.maps)

    def own(self, shape: Shape | None) -> tuple[torch.Tensor, ...]:
        """By our kernels, in one launch."""
        weight = self.maps[0][0]
        if self.name == "qkv":
            given = {"norm": self.norm, "turn": self.turn, "scorer": self.scorer, "shape": shape}
            return linears.project(self.x, self.maps, self.dim, **given)
        if self.name == "gate and up":
            return (linears.gated(self.x, *self.maps, norm=self.norm, shape=shape),)
        residual = None if self.name == "head" else self.residual
        return (linears.linear(self.x, weight, residual=residual, shape=shape),)

    def torch(self) -> tuple[torch.Tensor, ...]:
        """By torch's functions, as a model's modules call them."""
        weight = self.maps[0][0]
        if self.name == "head":
            return (F.linear(self.x, weight),)
        if self.name in ("out", "down"):
            return (self.residual + F.linear(self.x, weight),)
        wide = self.x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.norm.eps)
        x = self.norm.weight * wide.to(self.x.dtype)
        if self.name == "gate and up":
            gate, up = (F.linear(x, weight) for weight, _ in self.maps)
            return (F.silu(gate) * up,)
        q, k, v = (F.linear(x, weight).unflatten(1, (-1, self.dim)) for weight, _ in self.maps)
        scores = F.linear(x.float(), self.scorer.weight, self.scorer.bias)
        return self._turned(q), self._turned(k), v, scores

    def _turned(self, x: torch.Tensor) -> torch.Tensor:
        low, high = x.chunk(2, dim=-1)
        cos, sin = (part[:, None] for part in self.turn)
        return x * cos + torch.cat((-high, low), dim=-1) * sin
