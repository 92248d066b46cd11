"""The PyTorch backend on a CUDA device: the same results as on the CPU."""

from __future__ import annotations

import pytest
import torch
from sparsek_kernels import GATES, SparseKState, sparsek_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SETTINGS = dict(topk=(20, 31), window=17, sinks=3, backend="pytorch")


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-3), (torch.bfloat16, 2e-2)]
)
def test_forward_and_gradients(gate, dtype, tolerance, make_inputs, relative_error):
    here = make_inputs(700, batch=2, heads=8, groups=2, dim=32, kind="ties", dtype=dtype)
    there = [x.detach().cuda().requires_grad_() for x in here]
    wide = [x.detach().double().requires_grad_() for x in here]
    expected = sparsek_attention(*wide, gate=gate, **SETTINGS)
    out = sparsek_attention(*there, gate=gate, **SETTINGS)
    assert relative_error(out.cpu(), expected) < tolerance
    with torch.no_grad():
        inference = sparsek_attention(*there, gate=gate, **SETTINGS)
    assert relative_error(inference.cpu(), expected) < tolerance
    reference = torch.autograd.grad(expected.square().sum(), wide)
    grads = torch.autograd.grad(out.double().square().sum(), there)
    for a, b in zip(grads, reference, strict=True):
        assert relative_error(a.cpu(), b) < 5 * tolerance


@pytest.mark.parametrize("gate", GATES)
def test_state(gate, make_inputs, relative_error):
    inputs = [x.cuda() for x in make_inputs(300, batch=2, heads=4, groups=2, dim=16, grad=False)]
    settings = {key: value for key, value in SETTINGS.items() if key != "backend"}
    state = SparseKState.empty(2, 2, 16, dtype=torch.float64, device="cuda", **settings)
    whole = sparsek_attention(*inputs, gate=gate, **SETTINGS)
    outs, at = [], 0
    for size in [200, 1, 1, 1, 60, *[1] * 37]:
        part = [x[:, :, at : at + size] for x in inputs]
        out, state = sparsek_attention(*part, gate=gate, state=state, **SETTINGS)
        outs.append(out)
        at += size
    assert relative_error(torch.cat(outs, 2).cpu(), whole.cpu()) < 1e-10


def test_documents(make_inputs, relative_error):
    inputs = make_inputs(300, heads=4, groups=2, dim=16, grad=False)
    bounds = torch.tensor([0, 1, 120, 120, 300], dtype=torch.int32)
    expected = sparsek_attention(*inputs, cu_seqlens=bounds, **SETTINGS)
    there = [x.cuda() for x in inputs]
    out = sparsek_attention(*there, cu_seqlens=bounds.cuda(), **SETTINGS)
    assert relative_error(out.cpu(), expected) < 1e-10
