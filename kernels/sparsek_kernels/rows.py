"""Packed documents <-> padded rows, and their states: every document becomes a row of its own."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from sparsek_kernels.state import SparseKState


@dataclasses.dataclass
class RowGroup:
    """Documents of similar length, right-padded to the longest.

    Attributes:
        documents: [R] int64, which documents these are.
        lengths: [R] int64.
        index: [R, n] int64 position in the packed axis, 0 where padded.
        real: [R, n] bool.
    """

    documents: Tensor
    lengths: Tensor
    index: Tensor
    real: Tensor

    def gather(self, x: Tensor) -> Tensor:
        """[1, H, N, ...] -> [R, H, n, ...]; padding repeats token 0, which nothing looks at."""
        picked = x[0].index_select(1, self.index.flatten())
        return picked.unflatten(1, self.index.shape).transpose(0, 1)


def document_lengths(cu_seqlens: Tensor, n: int) -> list[int]:
    """Tokens of each document; waits for the device that has the bounds.

    Raises:
        ValueError: as `row_groups`.
    """
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or cu_seqlens.is_floating_point():
        raise ValueError("cu_seqlens must hold at least two integer bounds")
    host = cu_seqlens.tolist()
    lengths = [b - a for a, b in zip(host, host[1:], strict=False)]
    if host[0] != 0 or host[-1] != n or min(lengths) < 0:
        raise ValueError(f"cu_seqlens must rise from 0 to {n}, the number of packed tokens")
    return lengths


def row_groups(cu_seqlens: Tensor, n: int) -> list[RowGroup]:
    """Group documents by length, within a factor of two, so that padding at most doubles work.

    Args:
        cu_seqlens: [docs + 1] integers, bounds of documents packed along N; 0 first, n last.

    Raises:
        ValueError: the bounds are not 0 .. n in order.
    """
    lengths = document_lengths(cu_seqlens, n)
    bounds = cu_seqlens.to(torch.int64)
    buckets: dict[int, list[int]] = {}
    for document, length in enumerate(lengths):
        if length:
            buckets.setdefault(length.bit_length(), []).append(document)
    groups = []
    for members in buckets.values():
        documents = torch.tensor(members, device=bounds.device)
        size = (bounds[1:] - bounds[:-1])[documents]
        offset = torch.arange(max(lengths[d] for d in members), device=bounds.device)
        real = offset < size[:, None]
        index = (bounds[documents][:, None] + offset).masked_fill(~real, 0)
        groups.append(RowGroup(documents, size, index, real))
    return groups


def pack(groups: list[RowGroup], outputs: list[Tensor]) -> Tensor:
    """Inverse of `gather`: [R, H, n, D] per group -> [1, H, N, D]."""
    flat, place = [], []
    for group, out in zip(groups, outputs, strict=True):
        flat.append(out.transpose(0, 1)[:, group.real])
        place.append(group.index[group.real])
    return torch.cat(flat, 1).index_select(1, torch.cat(place).argsort())[None]


def join_states(old: SparseKState, states: list[SparseKState], order: list[Tensor]) -> SparseKState:
    """Rows of the groups' states in document order; empty documents keep their old row."""
    if not states:
        return old
    done = torch.cat(order)
    idle = torch.ones(old.batch, dtype=torch.bool, device=done.device)
    idle[done] = False
    rest = idle.nonzero()[:, 0]
    if rest.numel():
        kept = old.index_select(rest)
        if kept.support is None and states[0].support is not None:
            shape = (rest.numel(), old.layout.heads)
            kept.support = states[0].support.new_empty(*shape, 0)
            kept.tau = states[0].tau.new_full(shape, -torch.inf)
        states, done = [*states, kept], torch.cat([done, rest])
    return SparseKState.cat(states).index_select(done.argsort())
