"""The Hopper kernels on a CPU: their results against the naive twin, their barriers, their memory.

`gluon_emulator` says what an emulated run can find. Nothing here replaces the `gpu` suite.
"""

import math

import pytest
import torch
from sparsek_kernels.attention import sparsek_attention
from sparsek_kernels.naive.attention import naive_attention
from sparsek_kernels.state import SparseKState
from sparsek_kernels.triton import pipeline

import gluon_emulator

pytestmark = pytest.mark.interpret

COPIES_FIRST, COPIES_LAST, ONE_HALF_FIRST = (2, 0, 1), (0, 1, 2), (1, 2, 0)
SLOW = pytest.mark.slow
CASES = [  # n, k, window, sinks, heads, groups, dim, kind, dtype, who runs first
    (1, 1, 1, 0, 1, 1, 64, "normal", torch.bfloat16, COPIES_FIRST),
    (65, 9, 1, 2, 4, 1, 64, "ties", torch.float16, ONE_HALF_FIRST),
    (270, 40, 191, 0, 2, 2, 64, "offset", torch.float16, COPIES_LAST),
    (420, 300, 20, 3, 2, 1, 128, "rising", torch.bfloat16, COPIES_FIRST),
    (200, 64, 33, 1, 3, 1, 64, "equal", torch.float16, COPIES_FIRST),
    (97, 20, 16, 0, 16, 1, 64, "falling", torch.bfloat16, COPIES_LAST),
    # Rings go round more than once, without masks and with them.
    (660, 100, 540, 4, 1, 1, 64, "normal", torch.bfloat16, COPIES_FIRST),
    pytest.param(660, 100, 540, 4, 1, 1, 64, "normal", torch.bfloat16, COPIES_LAST, marks=SLOW),
    pytest.param(660, 100, 540, 4, 1, 1, 64, "normal", torch.bfloat16, ONE_HALF_FIRST, marks=SLOW),
    # More than one super tile: programs of keys that are interior throughout, or not at all.
    (1400, 256, 20, 3, 2, 1, 64, "falling", torch.float16, COPIES_FIRST),
    pytest.param(1300, 450, 30, 0, 1, 1, 64, "normal", torch.float16, COPIES_LAST, marks=SLOW),
]
TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.fixture
def emulated(monkeypatch):
    """Calls that Hopper would take run its kernels, emulated."""
    with gluon_emulator.emulated_modules() as import_anew:
        hopper = import_anew("sparsek_kernels.triton.hopper")

    def kernels(q, settings):
        assert hopper.takes(q, settings.gate, settings.scale)
        return hopper

    monkeypatch.setattr(pipeline, "hopper_kernels", kernels)


def gradients(inputs, grad, **options):
    """out, dq, dk, dv and dscores of the Triton backend."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    out = sparsek_attention(*inputs, backend="triton", **options)
    return out, *torch.autograd.grad(out, inputs, grad)


def half_inputs(make_inputs, n, dtype, **shape):
    """q, k and v in 16 bits, float32 scores, and an output gradient."""
    q, k, v, scores = make_inputs(n, grad=False, **shape)
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    return [q.to(dtype), k.to(dtype), v.to(dtype), scores.float()], grad.to(dtype)


@pytest.mark.parametrize("n, k, window, sinks, heads, groups, dim, kind, dtype, order", CASES)
def test_matches_the_naive_twin(
    emulated, make_inputs, relative_error,
    n, k, window, sinks, heads, groups, dim, kind, dtype, order,
):  # fmt: skip
    inputs, grad = half_inputs(
        make_inputs, n, dtype, heads=heads, groups=groups, dim=dim, kind=kind
    )
    options = dict(topk=k, window=window, sinks=sinks)
    with gluon_emulator.run_first(*order):
        out, *mine = gradients(inputs, grad, **options)
    wide = [x.double().requires_grad_() for x in inputs]
    if n <= 1000:
        twin = naive_attention(*wide, gate="straight_through", scale=1 / math.sqrt(dim), **options)
    else:
        twin = sparsek_attention(*wide, backend="pytorch", **options)
    theirs = torch.autograd.grad(twin, wide, grad.double(), allow_unused=True)
    assert relative_error(out, twin) < TOLERANCE[dtype]
    for name, a, b in zip(("dq", "dk", "dv", "dscores"), mine, theirs, strict=True):
        b = torch.zeros_like(a) if b is None else b
        assert torch.isfinite(a).all(), name
        # Gradients that are zero in exact arithmetic are sums that cancel: hence the floor.
        error = (a.double() - b).norm() / (b.double().norm() + 0.1)
        assert error < 2 * TOLERANCE[dtype], name


def test_frozen_scores_change_no_other_gradient(emulated, make_inputs, relative_error):
    (*rows, scores), grad = half_inputs(make_inputs, 300, torch.bfloat16, heads=2, dim=64)
    options = dict(topk=60, window=130, backend="triton")
    _, *wanted, _ = gradients([*rows, scores], grad, topk=60, window=130)
    rows = [x.clone().requires_grad_() for x in rows]
    out = sparsek_attention(*rows, scores, **options)
    mine = torch.autograd.grad(out, rows, grad)
    for a, b in zip(mine, wanted, strict=True):  # lists, and so sums, are in another order
        assert relative_error(a, b) < TOLERANCE[torch.bfloat16]


def test_packed_documents_equal_separate_calls(emulated, make_inputs, relative_error):
    bounds = [0, 1, 130, 130, 300]
    inputs, grad = half_inputs(make_inputs, 300, torch.bfloat16, heads=4, groups=2, dim=64)
    options = dict(topk=[30, 17], window=50, sinks=2)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    packed = gradients(inputs, grad, cu_seqlens=cu_seqlens, **options)
    parts = [
        gradients([x[:, :, a:b] for x in inputs], grad[:, :, a:b], **options)
        for a, b in zip(bounds, bounds[1:], strict=False)
        if a < b
    ]
    for mine, theirs in zip(packed, zip(*parts, strict=True), strict=True):
        assert relative_error(mine, torch.cat(theirs, 2)) < 4 * TOLERANCE[torch.bfloat16]


def test_same_bits_whoever_runs_first(emulated, make_inputs):
    inputs, grad = half_inputs(make_inputs, 330, torch.bfloat16, batch=2, heads=2, dim=64)
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for order in (COPIES_FIRST, ONE_HALF_FIRST):
            with gluon_emulator.run_first(*order):
                runs.append(gradients(inputs, grad, topk=60, window=30, sinks=1))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_carried_state_changes_nothing(emulated, make_inputs, relative_error):
    (q, k, v, scores), _ = half_inputs(make_inputs, 400, torch.bfloat16, heads=4, dim=64)
    options = dict(topk=90, window=64, sinks=4)
    whole = sparsek_attention(q, k, v, scores, backend="triton", **options)
    state = SparseKState.empty(1, 1, 64, dtype=torch.bfloat16, device="cpu", **options)
    chunks = []
    for part in (slice(0, 130), slice(130, 137), slice(137, 400)):
        cut = [x[:, :, part] for x in (q, k, v, scores)]
        out, state = sparsek_attention(*cut, state=state, backend="triton", **options)
        chunks.append(out)
    assert relative_error(torch.cat(chunks, 2), whole) < TOLERANCE[torch.bfloat16]


@torch.no_grad()
def test_packed_documents_continue_their_states_as_alone(emulated, make_inputs, relative_error):
    """In one launch: a document's slots stand before its tokens, and the next one's after them."""
    shape = dict(topk=[30, 17], window=50, sinks=2)
    state = SparseKState.empty(3, 2, 64, dtype=torch.bfloat16, **shape)
    alone = [state.index_select(torch.tensor([row])) for row in range(3)]
    for lengths in ([130, 20, 3], [2, 0, 90]):
        (q, k, v, scores), _ = half_inputs(
            make_inputs, sum(lengths), torch.bfloat16, heads=4, groups=2, dim=64
        )
        bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
        options = dict(shape, backend="triton")
        out, state = sparsek_attention(
            q, k, v, scores, cu_seqlens=torch.tensor(bounds), state=state, **options
        )
        for row, (first, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
            if first < stop:
                cut = [x[:, :, first:stop] for x in (q, k, v, scores)]
                expected, alone[row] = sparsek_attention(*cut, state=alone[row], **options)
                assert relative_error(out[:, :, first:stop], expected) < 1e-6
    assert torch.equal(state.positions[[0, 2]], torch.cat([alone[0].positions, alone[2].positions]))
