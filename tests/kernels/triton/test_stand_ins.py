"""Stand-ins for evicted pairs in the Triton kernels: forward, every gradient, states, decoding."""

import math

import pytest
import torch
from sparsek_kernels.attention import sparsek_attention
from sparsek_kernels.naive.attention import naive_attention
from sparsek_kernels.state import SparseKState
from sparsek_kernels.triton.decode import attend

HEADS, GROUPS, DIM = 4, 2, 20
TOLERANCE = {torch.float32: 3e-6, torch.float16: 3e-3}
BUDGET = dict(topk=(12, 5), window=8, sinks=2)


def pairs(count: int, dim: int = DIM, heads: int = HEADS) -> torch.Tensor:
    """[H, M, 2 D + 2] whose shares of the softmax are neither 0 nor 1."""
    made = torch.randn(heads, count, 2 * dim + 2, generator=torch.Generator().manual_seed(5))
    made[..., -2] -= 0.5
    made[..., -1] += 2.5  # some limits are reached
    return made


@pytest.mark.interpret
@pytest.mark.parametrize(
    "gate, count, dtype, sinks, n",
    [
        ("straight_through", 1, torch.float32, False, 70),
        ("straight_through", 3, torch.float16, False, 131),
        ("straight_through", 2, torch.float32, True, 29),
        ("log", 1, torch.float32, False, 70),
        ("kv", 2, torch.float32, True, 70),
    ],
)
def test_forward_and_every_gradient(make_inputs, relative_error, gate, count, dtype, sinks, n):
    inputs = make_inputs(n, batch=2, heads=HEADS, groups=GROUPS, dim=DIM, dtype=dtype, grad=False)
    inputs[3] = inputs[3].float()
    inputs.append(pairs(count))
    if sinks:
        inputs.append(torch.tensor([-3.0, 0.0, 1.0, 2.0]))
    grad = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    mine = [x.clone().requires_grad_() for x in inputs]
    theirs = [x.double().requires_grad_() for x in inputs]

    def more(leaves):
        return dict(zip(("stand_ins", "sink_logits"), leaves[4:], strict=False))

    options = BUDGET | {"gate": gate}
    out = sparsek_attention(*mine[:4], backend="triton", **options, **more(mine))
    options["scale"] = 1 / math.sqrt(DIM)
    twin = naive_attention(*theirs[:4], **options, **more(theirs))
    assert relative_error(out, twin) < TOLERANCE[dtype]
    found = torch.autograd.grad(out, mine, grad)
    wanted = torch.autograd.grad(twin, theirs, grad.double())
    for place, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert torch.isfinite(a).all() and b.abs().max() > 0, place
        assert (a.double() - b).norm() / (b.norm() + 0.1) < TOLERANCE[dtype] * 4, place


@pytest.mark.interpret
def test_they_are_not_there_before_something_was_evicted(make_inputs):
    n = BUDGET["window"] + BUDGET["sinks"] + min(BUDGET["topk"])
    inputs = make_inputs(n, heads=HEADS, groups=GROUPS, dim=DIM, dtype=torch.float32, grad=False)
    plain = sparsek_attention(*inputs, backend="triton", **BUDGET)
    same = sparsek_attention(*inputs, backend="triton", stand_ins=pairs(2), **BUDGET)
    assert torch.equal(plain, same)


@pytest.mark.interpret
def test_documents_are_as_they_are_alone(make_inputs, relative_error):
    lengths = (1, 40, 0, 75, 20)
    n = sum(lengths)
    inputs = make_inputs(n, heads=HEADS, groups=GROUPS, dim=DIM, dtype=torch.float32, grad=False)
    own = pairs(1)
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    leaves = [x.clone().requires_grad_() for x in (*inputs, own)]
    out = sparsek_attention(
        *leaves[:4], stand_ins=leaves[4], cu_seqlens=bounds, backend="triton", **BUDGET
    )
    alone = [x.double().requires_grad_() for x in (*inputs, own)]
    parts = [
        naive_attention(*(x[:, :, a:b] for x in alone[:4]), stand_ins=alone[4], **BUDGET)
        for a, b in zip(bounds.tolist(), bounds[1:].tolist(), strict=False)
        if b > a
    ]
    twin = torch.cat(parts, 2)
    assert relative_error(out, twin) < 3e-6
    grad = torch.randn(twin.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad(out, leaves, grad)
    wanted = torch.autograd.grad(twin, alone, grad.double())
    for place, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert (a.double() - b).norm() / (b.norm() + 0.1) < 1.2e-5, place


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("batch", [2, 6])  # steps in one launch and in two
def test_steps_equal_the_other_backend(relative_error, monkeypatch, dtype, batch):
    monkeypatch.setattr(attend, "LEAST_SLOTS", 4)  # several programs share a head's slots
    new = torch.Generator().manual_seed(3)
    n, steps = 14, (5, 1, 1, 4, 1, 1, 1)
    q = torch.randn(batch, HEADS, n, 16, generator=new)
    k, v = (torch.randn(batch, GROUPS, n, 16, generator=new) for _ in range(2))
    scores = torch.randn(batch, GROUPS, n, generator=new)
    shape = dict(topk=(4, 2), window=3, sinks=1)
    options = shape | dict(stand_ins=pairs(2, 16))
    state = SparseKState.empty(batch, GROUPS, 16, dtype=dtype, **shape)
    other, first = state.clone(), 0
    for step in steps:
        cut = [x[:, :, first : first + step] for x in (q, k, v, scores)]
        out, state = sparsek_attention(*cut, state=state, backend="triton", **options)
        same, other = sparsek_attention(*cut, state=other, backend="pytorch", **options)
        assert relative_error(out, same) < 1e-5
        first += step
    if dtype == torch.float32:
        whole = naive_attention(q, k, v, scores, **options)
        assert relative_error(out, whole[:, :, -1:]) < 1e-5
