"""Chunked prefill and decode through the Triton backend, against one call and the other backend."""

import pytest
import torch
from sparsek_kernels.attention import sparsek_attention
from sparsek_kernels.state import SparseKState, StateRows
from sparsek_kernels.triton.decode import attend
from sparsek_kernels.triton.decode import step as steps_of
from state_pool import strided_pool

pytestmark = pytest.mark.interpret


def selected_positions(state):
    """Per row and head, what the slots hold: sinks, selected set, window, each sorted."""
    parts, first = [], 0
    for k in state.layout.topk:
        for size in (state.layout.sinks, k, state.layout.window):
            parts.append(state.positions[:, first : first + size].sort(1).values)
            first += size
    return torch.cat(parts, 1)


@pytest.mark.parametrize(
    "topk, window, sinks",
    [
        ((5, 3), 4, 2),
        ((4, 0), 3, 1),
        ((6, 6), 1, 0),
        pytest.param((3, 3), 7, 5, marks=pytest.mark.slow),
    ],
)
def test_steps_equal_one_call(relative_error, monkeypatch, topk, window, sinks):
    monkeypatch.setattr(attend, "LEAST_SLOTS", 4)  # several programs share a head's slots
    batch, heads, groups, dim, steps = 2, 4, 2, 16, (3, 1, 20, 1, 1, 2, 1)
    n = sum(steps)
    new = torch.Generator().manual_seed(3)
    q = torch.randn(batch, heads, n, dim, generator=new)
    k, v = (torch.randn(batch, groups, n, dim, generator=new) for _ in range(2))
    scores = torch.randint(0, 4, (batch, groups, n), generator=new).float()
    slopes = torch.tensor([0.0, 0.02])
    options = dict(topk=topk, window=window, sinks=sinks, slopes=slopes)
    whole = sparsek_attention(q, k, v, scores, backend="triton", **options)
    shape = dict(topk=topk, window=window, sinks=sinks)
    state = SparseKState.empty(batch, groups, dim, **shape)
    other = state.clone()
    outs, first = [], 0
    for step in steps:
        cut = [x[:, :, first : first + step] for x in (q, k, v, scores)]
        out, state = sparsek_attention(*cut, state=state, backend="triton", **options)
        _, other = sparsek_attention(*cut, state=other, backend="pytorch", **options)
        assert torch.equal(selected_positions(state), selected_positions(other))
        assert torch.equal(state.seen, other.seen)
        outs.append(out)
        first += step
    assert relative_error(torch.cat(outs, 2), whole) < 1e-5


def test_packed_documents_fill_their_rows(relative_error):
    shape = dict(topk=(4, 4), window=3, sinks=2)
    states = [SparseKState.empty(3, 2, 16, **shape) for _ in range(2)]
    new = torch.Generator().manual_seed(0)
    for bounds in ([0, 5, 5, 19], [0, 1, 8, 9]):
        n = bounds[-1]
        q = torch.randn(1, 4, n, 16, generator=new)
        k, v = (torch.randn(1, 2, n, 16, generator=new) for _ in range(2))
        scores = torch.randn(1, 2, n, generator=new)
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
        outs = []
        for i, backend in enumerate(("triton", "pytorch")):
            out, states[i] = sparsek_attention(
                q, k, v, scores, cu_seqlens=cu_seqlens, state=states[i], backend=backend, **shape
            )
            outs.append(out)
        assert relative_error(outs[0], outs[1]) < 1e-5
        assert torch.equal(selected_positions(states[0]), selected_positions(states[1]))


@torch.no_grad()
def test_a_compiled_step_is_the_step(monkeypatch):
    shape = dict(topk=(5, 2), window=3, sinks=1)
    new = torch.Generator().manual_seed(0)
    k = torch.randn(2, 2, 12, 16, generator=new)
    scores = torch.randn(2, 2, 12, generator=new)
    slopes = torch.tensor([0.1, 0.0])

    def step(k, scores, state):
        options = dict(slopes=slopes, state=state, backend="triton", **shape)
        return sparsek_attention(k, k, k, scores, **options)[0]

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=False)
    states = [SparseKState.empty(2, 2, 16, **shape) for _ in range(2)]
    monkeypatch.setattr(steps_of, "ONE_LAUNCH_ROWS", 0)  # torch.compile takes two
    for t in range(12):
        token = k[:, :, t : t + 1].clone(), scores[:, :, t : t + 1].clone()
        assert torch.equal(step(*token, states[0]), compiled(*token, states[1]))
    for a, b in zip(states[0]._tensors().values(), states[1]._tensors().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kept", [torch.float32, torch.int8], ids=["float32", "int8"])
def test_rows_of_a_pool_step_in_place(monkeypatch, kept):
    monkeypatch.setattr(attend, "LEAST_SLOTS", 4)
    shape = dict(topk=(5, 3), window=4, sinks=2)
    options = dict(**shape, slopes=torch.tensor([0.0, 0.02]), backend="triton")
    new = torch.Generator().manual_seed(3)
    pool = strided_pool(5, 2, 16, dtype=kept, **shape)
    alone = SparseKState.empty(2, 2, 16, dtype=kept, **shape)
    rows, fresh = torch.tensor([3, 1]), torch.ones(2, dtype=torch.bool)
    for size in (6, 1, 1, 9, 1):
        q = torch.randn(2, 4, size, 16, generator=new)
        k, v = (torch.randn(2, 2, size, 16, generator=new) for _ in range(2))
        scores = torch.randint(0, 4, (2, 2, size), generator=new).float()
        expected, alone = sparsek_attention(q, k, v, scores, state=alone, **options)
        held = StateRows(pool, rows, fresh if size == 6 else None)
        out, _ = sparsek_attention(q, k, v, scores, state=held, **options)
        assert torch.equal(out, expected)
    for name, tensor in held.take().slots.items():
        assert torch.equal(tensor, alone.slots[name]), name
    assert pool.seen[[0, 2, 4]].tolist() == [7, 7, 7]


@torch.no_grad()
def test_a_state_of_views_is_read_and_steps_as_another():
    """A pool whose rows lie apart, given whole: where its rows' counts lay was not asked."""
    shape = dict(topk=(5, 3), window=4, sinks=2)
    new = torch.Generator().manual_seed(3)
    plain = SparseKState.empty(3, 2, 16, **shape)
    apart = strided_pool(3, 2, 16, **shape)
    for size in (6, 1, 9, 1):
        apart.copy_(plain)
        tensors = [torch.randn(3, heads, size, 16, generator=new) for heads in (4, 2, 2)]
        tensors.append(torch.randn(3, 2, size, generator=new))
        expected, plain = sparsek_attention(*tensors, state=plain, backend="triton", **shape)
        out, left = sparsek_attention(*tensors, state=apart, backend="triton", **shape)
        assert torch.equal(out, expected)
        for name, tensor in plain.slots.items():
            assert torch.equal(left.slots[name], tensor), name


@pytest.mark.parametrize("name", ["q", "k", "v", "scores", "slopes", "sink_logits"])
def test_a_gradient_that_the_kernels_have_not_is_refused(name):
    """Of any argument alone: asked for q's only, those of the others were lost without a word."""
    new = torch.Generator().manual_seed(0)
    given = {
        "q": torch.randn(1, 2, 5, 16, generator=new),
        "k": torch.randn(1, 1, 5, 16, generator=new),
        "v": torch.randn(1, 1, 5, 16, generator=new),
        "scores": torch.randn(1, 1, 5, generator=new),
        "slopes": torch.zeros(1),
        "sink_logits": torch.zeros(2),
    }
    shape = dict(topk=2, window=2, sinks=0)
    given[name].requires_grad_()
    with pytest.raises(ValueError, match="a gradient through a carried state"):
        state = SparseKState.empty(1, 1, 16, **shape)
        sparsek_attention(**given, **shape, state=state, backend="triton")
    with torch.no_grad():
        state = SparseKState.empty(1, 1, 16, **shape)
        sparsek_attention(**given, **shape, state=state, backend="triton")


@pytest.mark.parametrize(
    "topk, window, sinks, quantized",
    [((5, 3), 4, 2, False), ((4, 0), 3, 1, True), ((40, 3), 1, 0, False)],
)
def test_a_fresh_state_is_filled_as_one_that_is_looked_at(
    relative_error, topk, window, sinks, quantized
):
    shape = dict(topk=topk, window=window, sinks=sinks)
    dtype = torch.int8 if quantized else torch.float32
    new = torch.Generator().manual_seed(3)
    for n in (3, 33):
        q = torch.randn(2, 4, n, 16, generator=new)
        k, v = (torch.randn(2, n, 2, 16, generator=new).transpose(1, 2) for _ in range(2))
        scores = torch.randint(0, 4, (2, 2, n), generator=new).float()
        scores[:, :, 1] = -torch.inf
        slopes = torch.tensor([0.0, 0.02])
        found = []
        for more in ({"fresh": True}, {}, {"backend": "pytorch"}):
            state = SparseKState.empty(2, 2, 16, dtype=dtype, **shape, filled="fresh" not in more)
            options = {"backend": "triton", "slopes": slopes, **shape, **more}
            found.append(sparsek_attention(q, k, v, scores, state=state, **options))
        out, state = found[0]
        for other, held in found[1:]:
            assert relative_error(out, other) < 1e-5
            assert state.slots.keys() == held.slots.keys()
            assert all(torch.equal(state.slots[name], held.slots[name]) for name in state.slots)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["triton", "pytorch"])
@pytest.mark.parametrize("bounds", [None, [0, 1], [0, 9], []], ids=str)
def test_whatever_stands_in_a_fresh_state_is_not_looked_at(backend, bounds):
    """Nor where it is read as another: of one token, of documents, and of none."""
    shape = dict(topk=(5, 3), window=4, sinks=2)
    n = 1 if bounds is None else bounds[-1] if bounds else 0
    cu_seqlens = torch.tensor(bounds) if bounds else None
    q, k, v, scores = (torch.ones(1, *s) for s in ((4, n, 16), (2, n, 16), (2, n, 16), (2, n)))
    states = [SparseKState.empty(1, 2, 16, **shape, filled=filled) for filled in (True, False)]
    states[1].positions.fill_(7)
    found = [
        sparsek_attention(
            q, k, v, scores, cu_seqlens=cu_seqlens, state=state, fresh=True, backend=backend,
            **shape,
        )
        for state in states
    ]  # fmt: skip
    assert torch.equal(found[0][0], found[1][0])
    for name, tensor in found[0][1].slots.items():
        assert torch.equal(tensor, found[1][1].slots[name]), name
