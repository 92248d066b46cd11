"""A call cut into tiles of queries, each with the keys that it sees."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from sparsek_kernels.pytorch.blocks import BlockLists, block_lists

BLOCK = 128
# Logits held at once: what stays in a CPU's caches, or keeps an accelerator busy.
LOGITS_CPU = 1 << 20
LOGITS_DEVICE = 1 << 25


@dataclasses.dataclass
class Tiles:
    """One step of work: some tiles, their keys and what each query sees of them."""

    span: slice
    index: Tensor  # [T * W] int64 into flattened keys
    visible: Tensor  # [T, 1, Bq, W] bool
    gated: Tensor | None  # visible as a selected key, not by window [T, 1, Bq, W]
    effective: Tensor | None  # [T, 1, 1, W] float64
    tau: Tensor | None  # [T, 1, Bq, 1] float64

    def gate(self, dtype: torch.dtype) -> Tensor:
        """m = clip(e - tau, 0, 1) on selected keys, 1 on window and sinks."""
        m = (self.effective - self.tau).clamp(0, 1)
        return torch.where(self.gated, m, 1.0).to(dtype)

    def interior(self) -> Tensor:
        """Selected keys through which tau and the score carry gradient."""
        e = self.effective
        return self.gated & (e > self.tau) & (e - 1 < self.tau)


class Tiling:
    """The tiling of one call: shapes, key lists, and the walk over steps."""

    def __init__(self, q: Tensor, keys: Tensor, end: Tensor, base: int, window: int):
        self.batch, self.heads, self.n, self.dim = q.shape
        self.groups, self.m = keys.shape[1:3]
        self.rep = self.heads // self.groups
        self.rows = self.batch * self.groups
        self.block = min(BLOCK, self.n)
        self.base, self.window = base, window
        self.end = end.reshape(self.rows, self.m)
        self.lists: BlockLists = block_lists(
            self.end, n=self.n, base=base, window=window, block=self.block
        )
        self.blocks = self.lists.blocks
        self.pad = self.blocks * self.block - self.n

    def to_tiles(self, x: Tensor) -> Tensor:
        """[B, H, N, ...] -> [tiles, rep, Bq, ...]."""
        tail = x.shape[3:]
        if self.pad:
            x = torch.cat([x, x.new_zeros(*x.shape[:2], self.pad, *tail)], 2)
        x = x.reshape(self.rows, self.rep, self.blocks, self.block, *tail)
        return x.transpose(1, 2).reshape(self.rows * self.blocks, self.rep, self.block, *tail)

    def from_tiles(self, x: Tensor) -> Tensor:
        """[tiles, rep, Bq, ...] -> [B, H, N, ...]."""
        tail = x.shape[3:]
        x = x.reshape(self.rows, self.blocks, self.rep, self.block, *tail).transpose(1, 2)
        x = x.reshape(self.batch, self.heads, self.blocks * self.block, *tail)
        return x[:, :, : self.n].contiguous() if self.pad else x

    def per_tile(self, x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """[H] -> [tiles, rep, 1, 1]; None stays."""
        if x is None:
            return None
        x = x.to(dtype).view(1, self.groups, 1, self.rep)
        return x.expand(self.batch, -1, self.blocks, -1).reshape(-1, self.rep, 1, 1)

    def pad_rows(self, x: Tensor, value: float) -> Tensor:
        """[R, N] -> [tiles, Bq]."""
        x = torch.nn.functional.pad(x, (0, self.pad), value=value)
        return x.reshape(self.rows * self.blocks, self.block)

    def steps(self, effective: Tensor | None, tau: Tensor | None):
        """Yield Tiles that cover all tiles, each step within the logit budget."""
        device = self.end.device
        budget = LOGITS_CPU if device.type == "cpu" else LOGITS_DEVICE
        tiles = self.rows * self.blocks
        near = self.block + self.window - 1
        tau = self.pad_rows(tau, 0.0) if tau is not None else None
        end, first = self.end.flatten(), 0
        # Of one type with `end`: a mask compares each query with each key.
        inside = torch.arange(self.block, dtype=torch.int32, device=device)
        while first < tiles:
            last, width = first, 0
            while last < tiles:
                width = max(width, near + self.lists.widths[last])
                if last > first and (last + 1 - first) * width * self.block * self.rep > budget:
                    break
                last += 1
            index, real = self.lists.columns(first, last)
            number = torch.arange(first, last, device=device)
            flat = index + (number // self.blocks * self.m)[:, None]
            query = (number % self.blocks * self.block).int()[:, None] + inside
            query = query[:, None, :, None]
            joins = (index - self.base).int()[:, None, None, :]
            stop = end[flat].masked_fill(~real, -1)[:, None, None, :]
            visible = (query < stop) & (query >= joins - self.window)
            gated = e = t = None
            if tau is not None:
                gated = visible & (query >= joins)
                e = effective.flatten()[flat][:, None, None, :]
                t = tau[first:last, None, :, None]
            yield Tiles(slice(first, last), flat.flatten(), visible, gated, e, t)
            first = last
