"""Capped logits and sink logits in the Triton kernels: forward, every gradient, decoding."""

import math

import pytest
import torch
from sparsek_kernels.attention import sparsek_attention
from sparsek_kernels.naive.attention import naive_attention
from sparsek_kernels.state import SparseKState
from sparsek_kernels.triton import hopper
from sparsek_kernels.triton.decode import attend

CAP = 0.8
SINKS = (-3.0, 0.0, 1.0, 20.0)
TOLERANCE = {torch.float32: 3e-6, torch.float16: 3e-3}


@pytest.mark.interpret
@pytest.mark.parametrize(
    "gate, capped, dtype",
    [
        ("straight_through", True, torch.float32),
        ("straight_through", False, torch.float16),
        ("log", True, torch.float32),
        ("kv", True, torch.float32),
    ],
)
def test_forward_and_every_gradient(make_inputs, relative_error, gate, capped, dtype):
    inputs = make_inputs(70, heads=4, groups=2, dim=20, dtype=dtype, grad=False)
    inputs[3] = inputs[3].float()
    inputs.append(torch.tensor(SINKS))
    grad = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    options = dict(topk=12, window=8, sinks=2, gate=gate, softcap=CAP if capped else None)
    mine = [x.clone().requires_grad_() for x in inputs]
    theirs = [x.double().requires_grad_() for x in inputs]
    out = sparsek_attention(*mine[:4], sink_logits=mine[4], backend="triton", **options)
    options["scale"] = 1 / math.sqrt(20)
    twin = naive_attention(*theirs[:4], sink_logits=theirs[4], **options)
    assert relative_error(out, twin) < TOLERANCE[dtype]
    found = torch.autograd.grad(out, mine, grad)
    wanted = torch.autograd.grad(twin, theirs, grad.double())
    for name, a, b in zip(("dq", "dk", "dv", "dscores", "dsinks"), found, wanted, strict=True):
        assert torch.isfinite(a).all() and b.abs().max() > 0, name
        error = (a.double() - b).norm() / (b.norm() + 0.1)
        assert error < TOLERANCE[dtype] * 4, name


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_steps_equal_the_other_backend(relative_error, monkeypatch, dtype):
    monkeypatch.setattr(attend, "LEAST_SLOTS", 4)  # several programs share a head's slots
    new = torch.Generator().manual_seed(3)
    n, steps = 12, (5, 1, 1, 4, 1)
    q = torch.randn(2, 4, n, 16, generator=new)
    k, v = (torch.randn(2, 2, n, 16, generator=new) for _ in range(2))
    scores = torch.randn(2, 2, n, generator=new)
    shape = dict(topk=(4, 2), window=3, sinks=1)
    options = shape | dict(softcap=CAP, sink_logits=torch.tensor(SINKS))
    state = SparseKState.empty(2, 2, 16, dtype=dtype, **shape)
    other, first = state.clone(), 0
    for step in steps:
        cut = [x[:, :, first : first + step] for x in (q, k, v, scores)]
        out, state = sparsek_attention(*cut, state=state, backend="triton", **options)
        same, other = sparsek_attention(*cut, state=other, backend="pytorch", **options)
        assert relative_error(out, same) < 1e-5
        first += step


def test_hopper_kernels_leave_capped_logits_to_the_others():
    q = torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16)
    assert hopper.takes(q, "straight_through", 0.1)
    assert not hopper.takes(q, "straight_through", 0.1, softcap=30.0)
