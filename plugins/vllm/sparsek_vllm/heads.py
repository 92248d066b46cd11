"""Which KV heads a rank of tensor parallelism has.

vLLM gives each rank as many heads, in order. Heads of a converted model have very different
numbers of slots, and every rank must allocate what the fullest one needs: so heads are dealt by
their slots, and the rows of the projections are put in that order while weights are loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from sparsek_cli.errors import SparsekError
from sparsek_cli.families.row import SPLIT, Row


def dealt_heads(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """Heads of each rank, equally many, so that the ranks' sums of `sizes` are close.

    Where there are more ranks than heads, each head is on several ranks next to each other, as in
    vLLM.
    """
    if ranks >= len(sizes):
        return [[rank * len(sizes) // ranks] for rank in range(ranks)]
    room = len(sizes) // ranks
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    for head in sorted(range(len(sizes)), key=lambda head: -sizes[head]):
        open_ranks = [heads for heads in dealt if len(heads) < room]
        min(open_ranks, key=lambda heads: sum(sizes[h] for h in heads)).append(head)
    return sorted(sorted(heads) for heads in dealt)


def plain_heads(heads: int, ranks: int) -> list[list[int]]:
    """Heads of each rank in vLLM's own order."""
    if ranks >= heads:
        return [[rank * heads // ranks] for rank in range(ranks)]
    room = heads // ranks
    return [list(range(rank * room, (rank + 1) * room)) for rank in range(ranks)]


def query_heads_of(heads: Sequence[int], rank: int, count: int, group: int) -> list[int]:
    """A rank's `count` query heads: those of its KV heads, or its part where ranks share one.

    Args:
        heads: its KV heads. group: query heads of each.
    """
    if count == len(heads) * group:
        return [head * group + number for head in heads for number in range(group)]
    return list(range(rank * count, (rank + 1) * count))


def can_deal(row: Row) -> bool:
    """Whether all that a family's attention learned belongs to one head each, so that heads move.

    Its projections must be single matrices, and no norm may span the heads.
    """
    return row.projections == SPLIT and not row.joint_norm


def reordered(
    weights: Iterable[tuple[str, torch.Tensor]],
    orders: Mapping[str, Sequence[int]],
    head_dim: int,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights with the heads of some attention modules in another order.

    Args:
        weights: names and tensors of a checkpoint.
        orders: by attention module, e.g. `model.layers.0.self_attn`: its KV heads in the new order.

    Raises:
        SparsekError: weights of several heads that are in no projection, whose order is unknown.
    """
    *inputs, output = SPLIT
    for name, tensor in weights:
        module, _, rest = name.rpartition(".")
        attention, _, projection = module.rpartition(".")
        order = orders.get(attention)
        if order is not None and projection in inputs:
            tensor = tensor.unflatten(0, (len(order), -1))[list(order)].flatten(0, 1)
        elif order is not None and projection == output and rest == "weight":
            tensor = tensor.unflatten(1, (len(order), -1))[:, list(order)].flatten(1, 2)
        elif order is not None and _spans(projection, tensor, head_dim):
            raise SparsekError(
                f"{name} spans heads, which ranks would have in another order",
                hint="leave --tensor-parallel-size out, or give every head of a layer one topk",
            )
        yield name, tensor


def _spans(projection: str, tensor: torch.Tensor, head_dim: int) -> bool:
    """Whether a tensor of an attention module belongs to several heads and to no projection."""
    return projection not in (*SPLIT, "scorer") and tensor.numel() > head_dim
