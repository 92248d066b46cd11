"""Which backend is chosen, what insisting on one does, and what doctor is told."""

import logging
import os
import subprocess
import sys

import pytest
import torch
from sparsek_kernels import dispatch
from sparsek_kernels.attention import sparsek_attention
from sparsek_kernels.state import SlotLayout


def choose(name, n=50, dtype=torch.float32, **changes):
    options = dict(layout=SlotLayout((4, 4), 3, 1), gate="straight_through", cu_seqlens=None,
                   state=None)  # fmt: skip
    q = torch.zeros(1, 2, n, 8, dtype=dtype)
    return dispatch.backend(name, q, **(options | changes))


def test_a_cpu_runs_pytorch_and_says_so_once(caplog):
    dispatch._logged.clear()
    with caplog.at_level(logging.INFO, "sparsek_kernels"):
        runs = [choose(None) for _ in range(3)]
    assert runs[0].__module__ == "sparsek_kernels.pytorch.run"
    assert [record.message for record in caplog.records] == [
        "attention runs on the pytorch backend: device cpu"
    ]


def test_insisting_on_what_cannot_run_is_an_error():
    with pytest.raises(ValueError, match="backend must be"):
        choose("cuda")
    assert "TRITON_INTERPRET" not in os.environ  # although kernels of these tests are interpreted
    with pytest.raises(ValueError, match="device cpu"):
        choose("triton")
    with pytest.raises(ValueError, match="no key can be evicted"):
        choose("sdpa", n=9)


def test_dense_agrees_where_it_may_be_chosen(make_inputs, relative_error):
    inputs = make_inputs(8, heads=4, groups=2, dim=8, dtype=torch.float32)
    results = []
    for backend in ("sdpa", "pytorch"):
        out = sparsek_attention(*inputs, topk=4, window=3, sinks=1, backend=backend)
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for a, b in zip(*results, strict=True):
        assert relative_error(a, b) < 1e-5


def test_dense_survives_scores_that_no_number_is(make_inputs):
    """Times 0, for a gradient of zero, they were NaN in the whole output."""
    *rest, scores = make_inputs(8, heads=4, groups=2, dim=8, dtype=torch.float32)
    scores = scores.detach().clone()
    scores[0, 0, :2] = torch.tensor([-torch.inf, torch.nan])
    scores.requires_grad_()
    out = sparsek_attention(*rest, scores, topk=4, window=3, sinks=1, backend="sdpa")
    assert out.isfinite().all()
    assert torch.autograd.grad(out.sum(), scores)[0].eq(0).all()


def test_doctor_gets_plain_data():
    found = dispatch.describe()
    assert {"backend", "reason", "device", "break_even"} <= set(found)
    name, why = dispatch.explain(torch.device("cpu"), torch.float32)
    assert (name, why) == ("pytorch", "device cpu")


def test_triton_is_chosen_on_cuda_where_it_runs(monkeypatch):
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(dispatch, "_no_triton", lambda device: None)
    assert dispatch.explain(cuda, torch.bfloat16) == ("triton", dispatch.TAKES)
    assert dispatch.explain(cuda, torch.float64)[0] == "pytorch"
    monkeypatch.setattr(dispatch, "_no_triton", lambda device: "Triton is not installed")
    assert dispatch.explain(cuda, torch.bfloat16) == ("pytorch", "Triton is not installed")


def test_the_compiler_is_not_imported_before_it_is_used():
    code = "import sys, sparsek_kernels; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    marked = torch.compiler.assume_constant_result(lambda device: None)
    for function in (dispatch._not_by_itself, dispatch._no_triton):
        assert vars(marked).items() <= vars(function).items(), "torch marks it in another way"
