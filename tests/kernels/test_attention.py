"""sparsek_attention, forward and every gradient, against its N x N twin."""

from __future__ import annotations

import pytest
import torch
from sparsek_kernels import GATES, SparseKState, sparsek_attention
from sparsek_kernels.naive.attention import naive_attention

# n, k, window, sinks, heads, groups, kind of scores
CASES = [
    (1, 1, 1, 0, 1, 1, "normal"),
    (2, 1, 1, 0, 2, 1, "normal"),
    (63, 1, 2, 0, 2, 2, "normal"),
    (64, 5, 1, 4, 2, 1, "ties"),
    (65, 100, 3, 1, 4, 2, "normal"),
    (127, 8, 16, 4, 2, 2, "offset"),
    (129, 20, 7, 0, 16, 1, "normal"),
    (129, 6, 9, 2, 2, 1, "equal"),
    (129, 5, 40, 4, 1, 1, "rising"),
    (129, 5, 40, 0, 1, 1, "falling"),
    (129, 7, 5, 4, 2, 2, "wide"),
    (129, (0, 3, 11), 10, 4, 6, 3, "normal"),
    (100, 0, 10, 4, 2, 1, "normal"),
    (300, 16, 20, 4, 2, 1, "normal"),
]


def gradients(out: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    grads = torch.autograd.grad((out * weight).sum(), inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, inputs, strict=True)]


# What is selected does not depend on the gate: the others meet some shapes, and all in slow-test.
FEW = [CASES[i] for i in (1, 3, 4, 5, 11, 12)]


@pytest.mark.parametrize(
    ("case", "gate"),
    [
        pytest.param(
            case, gate, id=f"{'-'.join(map(str, case))}-{gate}",
            marks=[pytest.mark.slow] if gate != GATES[0] and case not in FEW else [],
        )
        for case in CASES
        for gate in GATES
    ],
)  # fmt: skip
def test_forward_and_gradients(case, gate, make_inputs, relative_error):
    n, topk, window, sinks, heads, groups, kind = case
    inputs = make_inputs(n, heads=heads, groups=groups, kind=kind)
    settings = dict(topk=topk, window=window, sinks=sinks, gate=gate)
    ours, twin = sparsek_attention(*inputs, **settings), naive_attention(*inputs, **settings)
    # An offset of 1e4 leaves float64 scores 12 digits, and no more.
    tolerance = 1e-10 if kind == "offset" else 1e-12
    assert relative_error(ours, twin) < tolerance
    with torch.no_grad():
        assert relative_error(sparsek_attention(*inputs, **settings), twin) < tolerance
    for name, a, b in zip(
        ["q", "k", "v", "scores"], gradients(ours, inputs), gradients(twin, inputs), strict=True
    ):
        assert relative_error(a, b) < 10 * tolerance, name


@pytest.mark.parametrize("gate", GATES)
def test_slopes(gate, make_inputs, relative_error):
    inputs = make_inputs(120, batch=2, heads=4, groups=2)
    slopes = torch.tensor([0.003, 0.02], dtype=torch.float64, requires_grad=True)
    settings = dict(topk=9, window=6, sinks=2, gate=gate, slopes=slopes)
    ours, twin = sparsek_attention(*inputs, **settings), naive_attention(*inputs, **settings)
    assert relative_error(ours, twin) < 1e-12
    leaves = [*inputs, slopes]
    for a, b in zip(gradients(ours, leaves), gradients(twin, leaves), strict=True):
        assert relative_error(a, b) < 1e-11


@pytest.mark.parametrize("gate", GATES)
def test_gradcheck(gate, make_inputs):
    inputs = make_inputs(10, heads=2, groups=1, dim=2, seed=3)
    if gate == "straight_through":
        # The score gradient of straight_through is not the derivative of its forward.
        inputs[3] = inputs[3].detach()

    def call(*x):
        return sparsek_attention(*x, topk=3, window=2, sinks=1, gate=gate)

    assert torch.autograd.gradcheck(call, inputs, eps=1e-6, atol=1e-6, fast_mode=True)


@pytest.mark.parametrize("gate", GATES)
def test_topk_of_everything_is_dense_causal_attention(gate, make_inputs, relative_error):
    q, k, v, scores = make_inputs(150, batch=2, heads=6, groups=3, dim=8)
    dense = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )
    out = sparsek_attention(q, k, v, scores, topk=150, window=7, sinks=3, gate=gate)
    assert relative_error(out, dense) < 1e-12
    for a, b in zip(gradients(out, [q, k, v]), gradients(dense, [q, k, v]), strict=True):
        assert relative_error(a, b) < 1e-12


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)]
)
def test_dtypes(dtype, tolerance, gate, make_inputs, relative_error):
    inputs = [x.detach().to(dtype).requires_grad_() for x in make_inputs(130, heads=4, groups=2)]
    settings = dict(topk=12, window=10, sinks=2, gate=gate)
    out = sparsek_attention(*inputs, **settings)
    with torch.no_grad():
        inference = sparsek_attention(*inputs, **settings)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    twin = naive_attention(*wide, **settings)
    assert out.dtype == inference.dtype == dtype
    assert relative_error(out, twin) < tolerance
    assert relative_error(inference, twin) < tolerance
    for a, b in zip(gradients(out.double(), inputs), gradients(twin, wide), strict=True):
        assert a.dtype == dtype
        assert relative_error(a, b) < 4 * tolerance


def test_autocast_leaves_the_precision_alone(make_inputs):
    inputs = make_inputs(80, dtype=torch.float32)
    expected = sparsek_attention(*inputs, topk=9, window=5)
    reference = torch.autograd.grad(expected.square().sum(), inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = sparsek_attention(*inputs, topk=9, window=5)
        grads = torch.autograd.grad(out.square().sum(), inputs)
    for a, b in zip([out, *grads], [expected, *reference], strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b)


def test_scores_may_have_another_dtype(make_inputs):
    q, k, v, scores = make_inputs(80, dtype=torch.float32, grad=False)
    wide = sparsek_attention(q, k, v, scores.double(), topk=9, window=5)
    half = sparsek_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), scores, topk=9, window=5)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), wide, atol=0.03, rtol=0.03)


def test_layouts_and_broadcast_inputs(make_inputs, relative_error):
    q, k, v, scores = make_inputs(70, batch=2, heads=4, groups=2, grad=False)
    expected = sparsek_attention(q, k, v, scores, topk=9, window=5)

    def scattered(x):
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    leaves = [scattered(x).requires_grad_() for x in (q, k, v, scores)]
    out = sparsek_attention(*leaves, topk=9, window=5)
    assert relative_error(out, expected) < 1e-13
    # A gradient that is expanded, as that of a sum is.
    straight = torch.autograd.grad(out.sum(), leaves)
    tight = [x.clone().requires_grad_() for x in (q, k, v, scores)]
    reference = torch.autograd.grad(sparsek_attention(*tight, topk=9, window=5).sum(), tight)
    for a, b in zip(straight, reference, strict=True):
        assert relative_error(a, b) < 1e-12


def test_scale(make_inputs, relative_error):
    inputs = make_inputs(60)
    ours = sparsek_attention(*inputs, topk=9, window=5, scale=0.3)
    assert relative_error(ours, naive_attention(*inputs, topk=9, window=5, scale=0.3)) < 1e-12


def test_steps_of_any_size_agree(make_inputs, relative_error, monkeypatch):
    from sparsek_kernels.pytorch import tiling

    inputs = make_inputs(150, batch=2, heads=4, groups=2)
    outs = []
    for block, budget in ((128, 1 << 20), (16, 1), (32, 30000)):
        monkeypatch.setattr(tiling, "BLOCK", block)
        monkeypatch.setattr(tiling, "LOGITS_CPU", budget)
        out = sparsek_attention(*inputs, topk=9, window=5, sinks=2, gate="log")
        outs.append([out, *gradients(out, inputs)])
    for other in outs[1:]:
        for a, b in zip(outs[0], other, strict=True):
            assert relative_error(a, b) < 1e-12


REFUSED = [
    (dict(topk=-1), ValueError),
    (dict(topk=[3]), ValueError),
    (dict(topk=2.5), TypeError),
    (dict(window=0), ValueError),
    (dict(window=1.0), TypeError),
    (dict(sinks=-1), ValueError),
    (dict(gate="soft"), ValueError),
    (dict(slopes=torch.zeros(3)), ValueError),
    (dict(backend="cuda"), ValueError),
    (dict(cu_seqlens=torch.tensor([0, 5])), ValueError),
    (dict(cu_seqlens=torch.tensor([0, 6, 4, 10])), ValueError),
]


@pytest.mark.parametrize("change, error", REFUSED, ids=lambda x: str(x))
def test_refusals(change, error, make_inputs):
    inputs = make_inputs(10, heads=4, groups=2, grad=False)
    with pytest.raises(error):
        sparsek_attention(*inputs, **{"topk": 3, "window": 2, **change})


def test_refused_shapes(make_inputs):
    q, k, v, scores = make_inputs(10, heads=4, groups=2, grad=False)
    for wrong in (
        (q[0], k, v, scores),
        (q, k[:, :, :5], v, scores),
        (q, k, v[..., :2], scores),
        (q, k, v, scores[:, :1]),
        (q[:, :3], k, v, scores),
    ):
        with pytest.raises(ValueError):
            sparsek_attention(*wrong, topk=3, window=2)
    with pytest.raises(TypeError):
        sparsek_attention(q.float(), k, v, scores, topk=3, window=2)


@torch.no_grad()
def test_an_answer_goes_where_it_is_wanted(make_inputs):
    """With a state and without, into memory of another order; what cannot hold it is refused."""
    inputs = make_inputs(30, grad=False, dtype=torch.float32)
    batch, heads, _, dim = inputs[0].shape
    settings = dict(topk=3, window=4, sinks=1)
    room = torch.full((batch, 30, heads, dim), torch.nan)
    out = room.transpose(1, 2)
    assert sparsek_attention(*inputs, out=out, **settings) is out
    assert torch.equal(out, sparsek_attention(*inputs, **settings))
    states = [
        SparseKState.empty(batch, inputs[1].shape[1], dim, dtype=torch.float32, **settings)
        for _ in range(2)
    ]
    room.fill_(torch.nan)
    found, _ = sparsek_attention(*inputs, state=states[0], out=out, **settings)
    assert found is out and torch.equal(
        found, sparsek_attention(*inputs, state=states[1], **settings)[0]
    )
    for wrong in (out[:, :, :5], out.double(), torch.empty_like(out.mT.contiguous()).mT):
        with pytest.raises(ValueError, match="out"):
            sparsek_attention(*inputs, out=wrong, **settings)
    with torch.enable_grad(), pytest.raises(ValueError, match="no_grad"):
        sparsek_attention(inputs[0].requires_grad_(), *inputs[1:], out=out, **settings)
