"""Packed documents that continue states: in one launch each answers as if it stood alone."""

import pytest
import torch
from sparsek_kernels import SparseKState, sparsek_attention

pytestmark = pytest.mark.interpret

STEPS = ([9, 1, 6, 0], [3, 20, 0, 6], [70, 1, 7, 1])
SLOW = pytest.mark.slow


def documents(cu_seqlens, state, tensors, **options):
    """The same, one document after the other, each a batch of its own.

    One token alone would be decoded, which rounds otherwise: it is packed, too.
    """
    outs, states = [], []
    for row, (first, stop) in enumerate(zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True)):
        own, bounds = state.index_select(torch.tensor([row])), torch.tensor([0, stop - first])
        if stop > first:
            cut = [x[:, :, first:stop] for x in tensors]
            packed = {"cu_seqlens": bounds} if stop == first + 1 else {}
            out, own = sparsek_attention(*cut, state=own, **packed, **options)
            outs.append(out)
        states.append(own)
    return torch.cat(outs, 2), SparseKState.cat(states)


@pytest.mark.parametrize(
    "topk, window, sinks, heads, kept, steps",
    [
        ((40, 6), 17, 3, 6, torch.float32, STEPS),
        ((4, 0), 3, 1, 4, torch.int8, STEPS[:2]),
        pytest.param((4, 0), 3, 1, 4, torch.int8, STEPS, marks=SLOW),
        pytest.param((5, 3), 4, 2, 4, torch.float32, STEPS, marks=SLOW),
        pytest.param((7, 7), 1, 0, 2, torch.int8, STEPS, marks=SLOW),
    ],
)
@torch.no_grad()
def test_each_document_is_read_as_alone_to_the_bit(topk, window, sinks, heads, kept, steps):
    shape = dict(topk=topk, window=window, sinks=sinks)
    new = torch.Generator().manual_seed(0)
    state = SparseKState.empty(4, 2, 16, dtype=kept, **shape)
    options = dict(**shape, slopes=torch.tensor([0.0, 0.02]), softcap=20.0, backend="triton")
    for lengths in steps:
        n = sum(lengths)
        tensors = [torch.randn(1, h, n, 16, generator=new) for h in (heads, 2, 2)]
        tensors.append(torch.randint(0, 9, (1, 2, n), generator=new).float())
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        expected, alone = documents(bounds.tolist(), state.clone(), tensors, **options)
        out, state = sparsek_attention(*tensors, cu_seqlens=bounds, state=state, **options)
        assert torch.equal(out, expected)
        told = torch.tensor(lengths) > 0  # the others keep what they had, in another order
        for name, tensor in state.slots.items():
            assert torch.equal(tensor[told], alone.slots[name][told]), name
        assert torch.equal(state.seen, alone.seen)


@torch.no_grad()
def test_a_document_without_tokens_keeps_what_it_had():
    shape = dict(topk=(5, 3), window=4, sinks=2)
    new = torch.Generator().manual_seed(0)

    def read(lengths, state):
        n = sum(lengths)
        tensors = [torch.randn(1, 2, n, 16, generator=new) for _ in range(3)]
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        scores = torch.randn(1, 2, n, generator=new)
        return sparsek_attention(
            *tensors, scores, cu_seqlens=bounds, state=state, backend="triton", **shape
        )[1]

    state = read([30, 20], SparseKState.empty(2, 2, 16, **shape))
    before = state.clone()
    after = read([0, 5], state)
    order, kept = before.positions[0].argsort(stable=True), after.positions[0].argsort(stable=True)
    # Positions repeat in the other head: its slots come later in both.
    assert torch.equal(before.positions[0][order], after.positions[0][kept])
    for name in ("keys", "values"):
        assert torch.equal(getattr(before, name)[0][order], getattr(after, name)[0][kept])


def test_bounds_are_checked():
    state = SparseKState.empty(2, 2, 16, topk=2, window=2)
    tensors = [torch.randn(1, 2, 10, 16) for _ in range(3)]
    for wrong in ([1, 5, 10], [0, 5, 9], [0, 11, 10]):
        with pytest.raises(ValueError, match="cu_seqlens"), torch.no_grad():
            sparsek_attention(
                *tensors, torch.zeros(1, 2, 10), cu_seqlens=torch.tensor(wrong), state=state,
                topk=2, window=2, backend="triton",
            )  # fmt: skip
