"""Pairs that stand in for what a query no longer sees: their logits, and their gradients."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from sparsek_kernels.pytorch.tiling import Tiling
from sparsek_kernels.state import SlotLayout


def log_missing(places: Tensor, layout: SlotLayout, dtype: torch.dtype) -> Tensor:
    """log n [B, G, N] of queries at `places` [B, N]: n tokens do not fit; -inf where all do."""
    missing = places[:, None] + 1 - _slots(layout, places.device)
    return missing.clamp_(min=0).to(dtype).log_()


@functools.lru_cache(maxsize=64)
def _slots(layout: SlotLayout, device: torch.device) -> Tensor:
    """[G, 1]: of each KV head."""
    return torch.tensor(layout.topk, device=device)[:, None] + (layout.sinks + layout.window)


def by_head(stand_ins: Tensor, groups: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """[H, M, 2 D + 2] -> keys and values [G, rep, M, D], biases and limits [G, rep, M, 1]."""
    heads, _, width = stand_ins.shape
    dim = width // 2 - 1
    grouped = stand_ins.to(dtype).unflatten(0, (groups, heads // groups))
    keys, values, biases, limits = grouped.split([dim, dim, 1, 1], 3)
    return keys, values, biases, limits.detach()


def tiled(
    stand_ins: Tensor | None, missing: Tensor | None, tiling: Tiling, scale: float, dtype
) -> TiledStandIns | None:
    return None if stand_ins is None else TiledStandIns(stand_ins, missing, tiling, scale, dtype)


class TiledStandIns:
    """The stand-ins of one tiled call.

    Args:
        stand_ins: [H, M, 2 D + 2]. missing: [B, G, N], as `log_missing` finds it.
    """

    def __init__(
        self, stand_ins: Tensor, missing: Tensor, tiling: Tiling, scale: float, dtype: torch.dtype
    ):
        self.scale = scale
        found = by_head(stand_ins, tiling.groups, dtype)
        self.keys, self.values, self.biases, self.limits = found
        missing = missing.to(dtype).reshape(tiling.rows, tiling.n)
        self.missing = tiling.pad_rows(missing, -torch.inf)[:, None, :, None]
        tiles = torch.arange(tiling.rows * tiling.blocks, device=missing.device)
        self.group = tiles // tiling.blocks % tiling.groups
        self.gradient = self.keys.new_zeros(*self.keys.shape[:3], stand_ins.shape[2])

    def of(self, span: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values [T, rep, M, D] of some tiles, and what adds to logits [T, rep, Bq, M]."""
        group = self.group[span]
        many = self.missing[span].minimum(self.limits[group].transpose(2, 3))
        added = self.biases[group].transpose(2, 3) + many
        return self.keys[group], self.values[group], added

    def beside(self, span: slice, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """Keys and values with the stand-ins behind them, and a mask that is added to logits.

        Args:
            k, v: [T, rep, W, D]. mask: [T, 1, Bq, W], bool or a number to add.
        """
        keys, values, added = self.of(span)
        if mask.dtype == torch.bool:
            mask = added.new_zeros(mask.shape).masked_fill_(~mask, -torch.inf)
        mask = torch.cat([mask.expand(-1, added.shape[1], -1, -1), added], 3)
        return torch.cat([k, keys], 2), torch.cat([v, values], 2), mask

    def logits(self, span: slice, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Of queries [T, rep, Bq, D], [T, rep, Bq, M], -inf where all fits; and their values."""
        keys, values, added = self.of(span)
        return added.add_((queries * self.scale) @ keys.transpose(2, 3)), values

    def backward(self, span: slice, queries: Tensor, grads: Tensor, log_total, delta) -> Tensor:
        """Gradient of the queries [T, rep, Bq, D]; that of the stand-ins is added up.

        Args:
            grads: of the output, [T, rep, Bq, D]. log_total, delta: [T, rep, Bq, 1].
        """
        logits, values = self.logits(span, queries)
        # Where nothing is missing, a query beyond the end may see nothing: -inf less -inf.
        weights = logits.sub_(log_total).exp_().masked_fill_(self.missing[span] == -torch.inf, 0)
        ds = (grads @ values.transpose(2, 3)).sub_(delta).mul_(weights)
        across = ds.transpose(2, 3)
        parts = across @ queries * self.scale, weights.transpose(2, 3) @ grads
        biases = across.sum(3, keepdim=True)
        parts = torch.cat([*parts, biases, torch.zeros_like(biases)], 3)
        group = self.group[span]
        self.gradient.index_add_(0, group, parts)
        return ds @ self.keys[group] * self.scale
