"""The traps of method.md, section 4, one test each, and what an approximation would get wrong."""

from __future__ import annotations

import pytest
import torch
from sparsek_kernels import GATES, SparseKState, sparsek_attention
from sparsek_kernels.naive.attention import naive_attention

SETTINGS = dict(topk=6, window=5, sinks=2)


def score_gradient(call, inputs) -> torch.Tensor:
    return torch.autograd.grad(call(*inputs).square().sum(), inputs[3])[0]


@pytest.mark.parametrize("gate", GATES)
def test_scores_decide(gate, make_inputs):
    """Fails if scores are ignored: one raised score brings one key back for all later queries."""
    q, k, v, scores = make_inputs(60, grad=False)
    low = scores.clone()
    low[:, :, 20] = -50.0
    high = scores.clone()
    high[:, :, 20] = 50.0
    a = sparsek_attention(q, k, v, low, gate=gate, **SETTINGS)
    b = sparsek_attention(q, k, v, high, gate=gate, **SETTINGS)
    torch.testing.assert_close(a[:, :, :25], b[:, :, :25], atol=1e-13, rtol=0)
    assert ((a - b)[:, :, 25:].abs().amax((1, 3)) > 1e-6).all()


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("at", [1, 31, 64, 99])
def test_the_future_is_not_seen(gate, at, make_inputs):
    """Fails if later keys, values or scores influence earlier queries."""
    inputs = make_inputs(100, batch=2, heads=4, groups=2, grad=False)
    before = sparsek_attention(*inputs, gate=gate, **SETTINGS)
    changed = [x.clone() for x in inputs]
    for x in changed:
        x[:, :, at:] = x[:, :, at:] * 3 + 7
    after = sparsek_attention(*changed, gate=gate, **SETTINGS)
    torch.testing.assert_close(before[:, :, :at], after[:, :, :at], atol=1e-13, rtol=0)


def test_one_interior_predicate(make_inputs, relative_error):
    """Knots exactly on tau: integer scores with k = 1 put p at 0 and at 1 without rounding."""
    for seed in range(5):
        inputs = make_inputs(80, kind="ties", seed=seed)
        for gate in GATES:
            settings = dict(topk=1, window=3, sinks=0, gate=gate)
            ours = score_gradient(lambda *x, s=settings: sparsek_attention(*x, **s), inputs)
            twin = score_gradient(lambda *x, s=settings: naive_attention(*x, **s), inputs)
            assert relative_error(ours, twin) < 1e-11


@pytest.mark.parametrize("gate", GATES)
def test_an_offset_changes_nothing(gate, make_inputs, relative_error):
    inputs = [x.detach().float() for x in make_inputs(200, heads=4, groups=2)]
    inputs[3] = (inputs[3] * 512).round() / 512  # exact beside 8192 in float32
    shifted = [*inputs[:3], inputs[3] + 8192]
    for x in (*inputs, *shifted):
        x.requires_grad_()
    a = sparsek_attention(*inputs, gate=gate, **SETTINGS)
    b = sparsek_attention(*shifted, gate=gate, **SETTINGS)
    assert torch.equal(a, b)
    ga = torch.autograd.grad(a.square().sum(), inputs)
    gb = torch.autograd.grad(b.square().sum(), shifted)
    for x, y in zip(ga, gb, strict=True):
        assert relative_error(x, y) < 1e-6


def test_slope_far_into_a_context_loses_no_score():
    """float32 scores near 0.001 beside slope * position = 1e4: only float64 tells them apart."""
    torch.manual_seed(0)
    n, settings = 40, dict(topk=3, window=2)
    q, k, v = (torch.randn(1, 1, n, 4) for _ in range(3))
    scores = torch.randn(1, 1, n) * 1e-3
    state = SparseKState.empty(1, 1, 4, **settings)
    state.seen += 1_000_000
    slopes = torch.tensor([1e-2])
    out, _ = sparsek_attention(q, k, v, scores, slopes=slopes, state=state, **settings)
    # Neither the state's empty slots nor the distance from 0 may show.
    near = sparsek_attention(q, k, v, scores, slopes=slopes, **settings)
    torch.testing.assert_close(out, near)


def test_ties_keep_the_earlier_token_everywhere(make_inputs):
    q, k, v, scores = make_inputs(50, kind="equal", grad=False)
    settings = dict(topk=4, window=3, sinks=0)
    out = sparsek_attention(q, k, v, scores, **settings)
    state = SparseKState.empty(1, 1, 4, dtype=torch.float64, **settings)
    pieces = []
    for t in range(50):
        part = [x[:, :, t : t + 1] for x in (q, k, v, scores)]
        piece, state = sparsek_attention(*part, state=state, **settings)
        pieces.append(piece)
    torch.testing.assert_close(torch.cat(pieces, 2), out, atol=1e-13, rtol=0)
    kept = state.positions[0].sort().values.tolist()
    assert kept == [0, 1, 2, 3, 47, 48, 49]


@pytest.mark.parametrize("gate", GATES)
def test_room_for_all_means_gates_of_one_and_no_gradient(gate, make_inputs):
    inputs = make_inputs(20, kind="wide")
    for n_candidates in (14, 15):
        settings = dict(topk=n_candidates, window=5, sinks=0, gate=gate)
        out = sparsek_attention(*inputs, **settings)
        grad = torch.autograd.grad(out.square().sum(), inputs[3], allow_unused=True)[0]
        assert torch.isfinite(out).all()
        if n_candidates >= 15:
            assert grad is None or not grad.any()


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("gap", [1.0, 1.5])
def test_gap_at_rank_k(gate, gap, make_inputs, relative_error):
    """Two separated clusters: the threshold is not unique, gates are 0 or 1, no division by 0."""
    inputs = make_inputs(60)
    steps = (torch.arange(60) % 10 == 3).double() * gap
    inputs[3] = steps[None, None].clone().requires_grad_()
    settings = dict(topk=6, window=1, sinks=0, gate=gate)
    ours, twin = sparsek_attention(*inputs, **settings), naive_attention(*inputs, **settings)
    assert relative_error(ours, twin) < 1e-12
    grads = torch.autograd.grad(ours.square().sum(), inputs)
    assert all(torch.isfinite(g).all() for g in grads)
    reference = torch.autograd.grad(twin.square().sum(), inputs)
    assert relative_error(grads[0], reference[0]) < 1e-12


def test_padding_carries_no_weight(make_inputs):
    """Right padding is invisible to what stands before it, and gets no gradient from it."""
    inputs = make_inputs(50)
    padded = [
        torch.cat([x.detach(), x.detach()[:, :, :30] * 9], 2).requires_grad_() for x in inputs
    ]
    for gate in GATES:
        out = sparsek_attention(*inputs, gate=gate, **SETTINGS)
        wide = sparsek_attention(*padded, gate=gate, **SETTINGS)[:, :, :50]
        torch.testing.assert_close(wide, out, atol=1e-13, rtol=0)
        grads = torch.autograd.grad(out.square().sum(), inputs)
        wider = torch.autograd.grad(wide.square().sum(), padded)
        for a, b in zip(wider, grads, strict=True):
            torch.testing.assert_close(a[:, :, :50], b, atol=1e-12, rtol=0)
            assert not a[:, :, 50:].any()


def test_unselected_keys_leave_the_softmax(make_inputs):
    """A key that is not kept must not stay behind as a zero logit or a zero value."""
    q, k, v, scores = make_inputs(40, grad=False)
    for gate in GATES:
        settings = dict(topk=3, window=2, sinks=0, gate=gate)
        before = sparsek_attention(q, k, torch.ones_like(v), scores, **settings)
        if gate != "kv":
            torch.testing.assert_close(before, torch.ones_like(before))
        out = sparsek_attention(q, k, v, scores, **settings)[:, :, -1]
        order = scores[0, 0, :39].argsort(descending=True)
        kept = torch.cat([order[:3], torch.tensor([38, 39])]).unique()
        some = [x.clone() for x in (k, v)]
        gone = torch.ones(40, dtype=torch.bool)
        gone[kept] = False
        for x in some:
            x[:, :, gone] = 1e6
        again = sparsek_attention(q, *some, scores, **settings)[:, :, -1]
        if len(kept) == 5:
            torch.testing.assert_close(again, out)


def test_dead_and_loud_scores_stay_finite(make_inputs):
    for scale in (0.0, 1e-3, 1e3):
        for gate in GATES:
            inputs = make_inputs(150, dtype=torch.float32)
            inputs[3] = (inputs[3].detach() * scale).requires_grad_()
            out = sparsek_attention(*inputs, gate=gate, **SETTINGS)
            grads = torch.autograd.grad(out.square().sum(), inputs)
            assert torch.isfinite(out).all() and all(torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("gate", GATES)
def test_minus_infinity_is_never_selected(gate, make_inputs):
    """The same as a candidate list without those keys, thresholds and gradients included."""
    q, k, v, scores = make_inputs(90, grad=False)
    banned = torch.arange(90) % 3 == 1
    scores = scores.masked_fill(banned, -torch.inf)
    changed = [x.masked_fill(banned[None, None, :, None], 7.0) for x in (k, v)]
    settings = dict(topk=6, window=1, sinks=0, gate=gate)
    scores.requires_grad_()
    a = sparsek_attention(q, k, v, scores, **settings)[:, :, ~banned]
    b = sparsek_attention(q, *changed, scores, **settings)[:, :, ~banned]
    torch.testing.assert_close(a, b)
    grad = torch.autograd.grad(a.square().sum(), scores)[0]
    assert torch.isfinite(grad).all() and not grad[:, :, banned].any()
    state = SparseKState.empty(1, 1, 4, dtype=torch.float64, topk=6, window=1)
    with torch.no_grad():
        pieces = []
        for t in range(90):
            part = [x[:, :, t : t + 1] for x in (q, k, v, scores)]
            piece, state = sparsek_attention(*part, state=state, **settings)
            pieces.append(piece)
    torch.testing.assert_close(torch.cat(pieces, 2)[:, :, ~banned], a, atol=1e-12, rtol=0)
