"""Forward and every gradient against the naive float64 twin."""

import math

import pytest
import torch
from sparsek_kernels.attention import sparsek_attention
from sparsek_kernels.naive.attention import naive_attention

pytestmark = pytest.mark.interpret

TOLERANCE = {torch.float32: 3e-6, torch.float16: 3e-3}
CASES = [  # n, k, window, sinks, heads, groups, dim, gate, kind, dtype
    (1, 1, 1, 0, 1, 1, 16, "straight_through", "normal", torch.float32),
    (65, 9, 1, 2, 2, 1, 16, "straight_through", "ties", torch.float32),
    (97, 12, 8, 0, 3, 1, 20, "straight_through", "offset", torch.float32),
    (40, 99, 5, 1, 2, 2, 16, "straight_through", "normal", torch.float32),
    (70, 10, 7, 3, 4, 2, 16, "straight_through", "rising", torch.float16),
    (70, 12, 8, 2, 4, 1, 16, "log", "normal", torch.float32),
    (70, 1, 3, 0, 1, 1, 16, "log", "offset", torch.float32),
    (66, 12, 8, 2, 2, 2, 24, "kv", "normal", torch.float32),
    (66, 7, 16, 1, 2, 1, 16, "kv", "equal", torch.float32),
]


def both(inputs, grad, **options):
    """(out, gradients) of the Triton backend and of the float64 twin."""
    q, k, v, scores = inputs
    sparse = [x.detach().clone().requires_grad_() for x in inputs]
    naive = [x.detach().double().requires_grad_() for x in inputs]
    out = sparsek_attention(*sparse, backend="triton", **options)
    options["scale"] = 1 / math.sqrt(q.shape[-1])
    twin = naive_attention(*naive, **options)
    return (
        (out, torch.autograd.grad(out, sparse, grad)),
        (twin, torch.autograd.grad(twin, naive, grad.double(), allow_unused=True)),
    )


@pytest.mark.parametrize("n, k, window, sinks, heads, groups, dim, gate, kind, dtype", CASES)
def test_matches_the_naive_twin(
    make_inputs, relative_error, n, k, window, sinks, heads, groups, dim, gate, kind, dtype
):
    batch = 2 if groups == 2 else 1
    inputs = make_inputs(
        n, batch=batch, heads=heads, groups=groups, dim=dim, kind=kind, dtype=dtype, grad=False
    )
    inputs[3] = inputs[3].float()
    grad = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    (out, mine), (twin, theirs) = both(inputs, grad, topk=k, window=window, sinks=sinks, gate=gate)
    assert relative_error(out, twin) < TOLERANCE[dtype]
    for name, a, b in zip(("dq", "dk", "dv", "dscores"), mine, theirs, strict=True):
        b = torch.zeros_like(a) if b is None else b
        assert torch.isfinite(a).all(), name
        # Gradients that are zero in exact arithmetic are sums that cancel: hence the floor.
        error = (a.double() - b).norm() / (b.double().norm() + 0.1)
        assert error < TOLERANCE[dtype] * 4, name


def test_the_scores_decide(make_inputs):
    """No kernel that ignores its scores can pass: other scores, other output."""
    q, k, v, scores = make_inputs(120, dim=16, dtype=torch.float32, grad=False)
    run = lambda s: sparsek_attention(q, k, v, s, topk=8, window=4, backend="triton")  # noqa: E731
    assert (run(scores) - run(-scores)).abs().max() > 0.1


def test_packed_documents_equal_separate_calls(make_inputs, relative_error):
    bounds = [0, 1, 40, 40, 97]
    inputs = make_inputs(97, heads=4, groups=2, dim=16, dtype=torch.float32, grad=False)
    options = dict(topk=[6, 3], window=5, sinks=2, backend="triton")
    packed = [x.clone().requires_grad_() for x in inputs]
    slopes = torch.tensor([0.05, 0.0], requires_grad=True)
    out = sparsek_attention(
        *packed, cu_seqlens=torch.tensor(bounds, dtype=torch.int32), slopes=slopes, **options
    )
    gradients = torch.autograd.grad(out.square().sum(), [*packed, slopes])
    parts = [x.clone().requires_grad_() for x in inputs]
    outs = [
        sparsek_attention(*(x[:, :, a:b] for x in parts), slopes=slopes, **options)
        for a, b in zip(bounds, bounds[1:], strict=False)
        if a < b
    ]
    alone = torch.cat(outs, 2)
    wanted = torch.autograd.grad(alone.square().sum(), [*parts, slopes])
    assert relative_error(out, alone) < 1e-6
    for a, b in zip(gradients, wanted, strict=True):
        assert relative_error(a, b) < 1e-5


def test_layouts_do_not_matter(make_inputs, relative_error):
    q, k, v, scores = make_inputs(
        70, batch=2, heads=4, groups=2, dim=16, dtype=torch.float32, grad=False
    )
    options = dict(topk=6, window=4, backend="triton")
    wanted = sparsek_attention(q, k, v, scores, **options)
    strange = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    column = v.transpose(2, 3).contiguous().transpose(2, 3)
    every_other = torch.stack((scores, scores), -1)[..., 0]
    out = sparsek_attention(*strange, column, every_other, **options)
    assert relative_error(out, wanted) < 1e-6


def test_outputs_lie_as_the_next_map_reads_them(make_inputs):
    """Tokens before heads: the model's [B, N, H * D] is a view then, and no copy is kept."""
    inputs = make_inputs(70, batch=2, heads=4, groups=2, dim=16, dtype=torch.float32)
    out = sparsek_attention(*inputs, topk=9, window=5, sinks=1, backend="triton")
    (dq,) = torch.autograd.grad(out.sum(), inputs[:1])
    for rows in (out, dq):
        assert rows.transpose(1, 2).is_contiguous()


def test_deterministic_mode_agrees(make_inputs, relative_error):
    inputs = make_inputs(90, batch=2, dim=16, dtype=torch.float32)
    out = sparsek_attention(*inputs, topk=9, window=6, sinks=1, backend="triton")
    loose = torch.autograd.grad(out, inputs, out.detach(), retain_graph=True)
    torch.use_deterministic_algorithms(True)
    try:
        strict = torch.autograd.grad(out, inputs, out.detach(), retain_graph=True)
        again = torch.autograd.grad(out, inputs, out.detach())
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b, c in zip(loose, strict, again, strict=True):
        assert relative_error(a, b) < 1e-5
        assert torch.equal(b, c)


@pytest.mark.parametrize(
    "gate, share, topk",
    [("straight_through", 0.9, 12), ("log", 0.4, 6), ("kv", 0.9, 12)]
    + [
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (("straight_through", 0.4, 6), ("log", 0.9, 12), ("kv", 0.4, 6))
    ],
)
def test_minus_infinity_is_never_selected(make_inputs, relative_error, gate, share, topk):
    """Also where there is room for it, and gradients stay finite."""
    inputs = make_inputs(60, heads=2, groups=2, dim=16, dtype=torch.float32, grad=False)
    banned = torch.rand(inputs[3].shape, generator=torch.Generator().manual_seed(0)) < share
    inputs[3] = inputs[3].masked_fill(banned, -torch.inf)
    grad = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1))
    (out, mine), (twin, theirs) = both(inputs, grad, topk=topk, window=3, sinks=1, gate=gate)
    assert relative_error(out, twin) < 3e-6
    for name, a, b in zip(("dq", "dk", "dv", "dscores"), mine, theirs, strict=True):
        b = torch.zeros_like(a) if b is None else b.nan_to_num(0.0)
        assert torch.isfinite(a).all(), name
        assert (a.double() - b).norm() / (b.double().norm() + 0.1) < 1e-5, name
