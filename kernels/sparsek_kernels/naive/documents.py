"""The keys of documents packed along one row, one document after the other."""

import torch
from torch import Tensor

from sparsek_kernels.keys import KeyList, list_keys
from sparsek_kernels.scores import effective_scores
from sparsek_kernels.state import SlotLayout, SparseKState


def naive_documents(
    k: Tensor,
    v: Tensor,
    scores: Tensor,
    slopes: Tensor | None,
    bounds: list[int],
    layout: SlotLayout,
    state: SparseKState,
) -> list[KeyList]:
    """What `list_keys` makes of each document and its row of the state.

    Args:
        k, v: [1, G, N, D]. scores: [1, G, N]. bounds: docs + 1 of them, along N.
    """
    lists = []
    for row, (first, stop) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        own = state.index_select(torch.tensor([row]))
        positions = own.seen[:, None] + torch.arange(stop - first)
        effective = effective_scores(scores[:, :, first:stop], slopes, positions)
        cut = (x[:, :, first:stop] for x in (k, v))
        lists.append(list_keys(*cut, effective, positions, layout, own))
    return lists
