"""Documents' keys in one row, in one launch, against each document's own list."""

import dataclasses

import pytest
import torch
from sparsek_kernels import SparseKState, sparsek_attention
from sparsek_kernels.naive.documents import naive_documents
from sparsek_kernels.state import EMPTY, StateRows
from sparsek_kernels.triton.documents.listing import list_documents
from sparsek_kernels.triton.geometry import geometry
from sparsek_kernels.triton.state import first_slots
from state_pool import strided_pool

SLOPES = torch.tensor([0.0, 0.3])


def tokens(n, dim, dtype, new):
    """q, k, v and scores of few values, so that many tie; k and v lie as models make them."""
    q = torch.randn(1, 4, n, dim, generator=new).to(dtype)
    k, v = (torch.randn(1, n, 2, dim, generator=new).transpose(1, 2).to(dtype) for _ in range(2))
    return q, k, v, torch.randint(0, 4, (1, 2, n), generator=new).float()


def state_of(ages, shape, dim, dtype, kept, new):
    """A row for each age, read in a chunk and then token by token: slots in no order."""
    rows = []
    for age in ages:
        state = SparseKState.empty(1, 2, dim, dtype=kept, **shape)
        _, k, v, scores = tokens(age, dim, dtype, new)
        for low, high in [(0, age // 2), *((t, t + 1) for t in range(age // 2, age))]:
            cut = (x[:, :, low:high] for x in (k, k, v, scores))
            state = sparsek_attention(*cut, state=state, backend="pytorch", **shape)[1]
        rows.append(state)
    return SparseKState.cat(rows)


CASES = pytest.mark.parametrize(
    "topk, window, sinks, dim, dtype, kept, slopes",
    [
        ((40, 6), 17, 3, 16, torch.float32, torch.float32, SLOPES),
        ((4, 0), 3, 1, 16, torch.float16, torch.int8, None),
        ((9, 4), 8, 2, 16, torch.bfloat16, torch.bfloat16, None),
        ((5, 150), 40, 0, 24, torch.float32, torch.int8, SLOPES),
        ((0, 0), 1, 5, 16, torch.float16, torch.float16, SLOPES),
    ],
)


@pytest.mark.interpret
@CASES
def test_each_document_is_listed_as_alone(device, topk, window, sinks, dim, dtype, kept, slopes):
    check(device, topk, window, sinks, dim, dtype, kept, slopes)


@pytest.mark.gpu
@CASES
def test_each_document_is_listed_as_alone_on_a_gpu(
    device, topk, window, sinks, dim, dtype, kept, slopes
):
    check(device, topk, window, sinks, dim, dtype, kept, slopes)


@torch.no_grad()
def check(device, topk, window, sinks, dim, dtype, kept, slopes):
    shape = dict(topk=topk, window=window, sinks=sinks)
    new = torch.Generator().manual_seed(0)
    lengths, ages = [0, 9, 1, 70, 0, 2], [0, 3, 60, 33, 90, 0]
    state = state_of(ages, shape, dim, dtype, kept, new)
    layout, width = state.layout, state.layout.width
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    q, k, v, scores = tokens(sum(lengths), dim, dtype, new)
    there = [None if x is None else x.to(device) for x in (q, k, v, scores, slopes, bounds.int())]
    starts = first_slots(layout, there[0].device)
    found, shape = list_documents(*there, layout, state.to(device), starts)
    found = dataclasses.replace(
        found, keys=found.keys.cpu(), values=found.values.cpu(), effective=found.effective.cpu(),
        positions=found.positions.cpu(), stored={n: x.cpu() for n, x in found.stored.items()},
    )  # fmt: skip
    places, line = bounds.tolist(), 0
    for listed in naive_documents(k, v, scores, slopes, places, layout, state):
        there = slice(line, line + listed.keys.shape[2])
        line = there.stop
        assert torch.equal(found.positions[:, :, there], listed.positions)
        assert torch.equal(found.effective[:, :, there], listed.effective)
        full = listed.positions != EMPTY  # what an empty slot holds is never looked at
        assert found.stored.keys() == listed.stored.keys()
        pairs = [(found.stored[name], x) for name, x in listed.stored.items()]
        for mine, alone in [*pairs, (found.keys, listed.keys), (found.values, listed.values)]:
            assert torch.equal(mine[:, :, there][full], alone[full])
            assert mine[:, :, there].isfinite().all()
    assert line == found.keys.shape[2]
    assert (found.base, found.slots, found.n) == (listed.base, listed.slots, k.shape[2])
    first = bounds + torch.arange(7) * width
    held = (state.seen - sinks).clamp(0, window)
    expected = geometry(
        q.shape, found.keys.shape, q.device, bounds, first, first[:-1] + width - held
    )
    assert torch.equal(shape.sequences.cpu(), expected.sequences)
    for name in ("batch", "heads", "group", "queries", "keys", "packed", "longest", "regular"):
        assert getattr(shape, name) == getattr(expected, name)


@pytest.mark.interpret
@torch.no_grad()
def test_documents_are_read_in_few_operations(operations):
    """Of a pool's rows; a short prompt takes as long as its launches (and was 190 of them)."""
    shape = dict(topk=(40, 6), window=17, sinks=3)
    new = torch.Generator().manual_seed(0)
    pool = strided_pool(6, 2, 16, dtype=torch.float32, **shape)
    rows = StateRows(pool, torch.tensor([1, 3, 0]), torch.tensor([True, True, True]))
    bounds = torch.tensor([0, 9, 10, 70])
    given = tokens(70, 16, torch.float32, new)
    with operations() as done:
        sparsek_attention(*given, cu_seqlens=bounds, state=rows, backend="triton", **shape)
    assert sum(done.values()) <= 12, done
