"""Ranks within rows are those of a stable sort of each row, whichever way takes them apart."""

import pytest
import torch

pytest.importorskip("triton")

from sparsek_kernels.triton import ranks
from sparsek_kernels.triton.geometry import geometry

pytestmark = pytest.mark.interpret


@pytest.mark.parametrize(
    "batch, heads, keys",
    [(1, 1, 700), (1, 2, 1), (1, 3, 1500), (2, 4, 1025), (1, 16, 513), (3, 7, 60)],
)
def test_each_row_is_sorted_by_itself(batch, heads, keys):
    torch.manual_seed(batch * heads + keys)
    scores = torch.randint(-9, 9, (batch, heads, keys)).double()
    scores[..., ::7] = -torch.inf
    shape = geometry((batch, heads, keys, 1), (batch, heads, keys, 1), scores.device)
    order, rank = ranks.rank_order(scores, shape)
    rows = torch.arange(batch * heads)[:, None] * keys
    expected = scores.flatten(0, 1).sort(descending=True, stable=True).indices + rows
    assert torch.equal(order.long(), expected.flatten())
    assert torch.equal(rank[order.long()].long(), torch.arange(order.numel()))


def test_where_programs_are_many_a_second_sort_does_it(monkeypatch):
    scores = torch.randn(1, 4, 3000, dtype=torch.float64)
    shape = geometry(scores.shape + (1,), scores.shape + (1,), scores.device)
    expected = ranks.rank_order(scores, shape)
    monkeypatch.setattr(ranks, "MOST_PROGRAMS", 1)
    assert all(map(torch.equal, ranks.rank_order(scores, shape), expected))
