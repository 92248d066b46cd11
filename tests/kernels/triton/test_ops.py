"""The custom ops: schema, fake versions, and one graph under torch.compile."""

import inspect

import pytest
import torch
from sparsek_kernels.attention import sparsek_attention

pytestmark = pytest.mark.interpret


@pytest.mark.parametrize(
    "gate, softcap, own, pairs",
    [("straight_through", 2.0, torch.zeros(4), torch.zeros(4, 1, 34)), ("kv", None, None, None)],
)
def test_fake_versions_describe_the_real_ones(make_inputs, gate, softcap, own, pairs):
    from sparsek_kernels.triton.ops import attention_op

    q, k, v, scores = make_inputs(20, heads=4, groups=2, dim=16, dtype=torch.float32, grad=False)
    torch.library.opcheck(
        attention_op,
        (q, k, v, scores.double(), own, pairs, None, [5, 4], 4, 1, gate, 0.25, softcap),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("has_stand_ins", [False, True])
def test_compile_keeps_one_graph(make_inputs, has_stand_ins):
    inputs = make_inputs(30, heads=2, dim=16, dtype=torch.float32)
    if has_stand_ins:
        inputs = [*inputs, torch.randn(2, 1, 34).requires_grad_()]

    def step(q, k, v, scores, *pairs):
        more = {"stand_ins": pairs[0]} if pairs else {}
        shape = dict(topk=5, window=4, backend="triton")
        return sparsek_attention(q * 2, k, v, scores, **shape, **more) + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for call in (compiled, step):
        out = call(*inputs)
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_an_eager_call_asks_for_no_signature(make_inputs, monkeypatch):
    """`autograd.Function` binds arguments by name where it has a `setup_context`: 0.1 ms a call."""
    inputs = make_inputs(30, heads=2, dim=16, dtype=torch.float32)
    asked = []
    monkeypatch.setattr(inspect, "signature", lambda *given, **more: asked.append(given))
    out = sparsek_attention(*inputs, topk=5, window=4, backend="triton")
    with torch.no_grad():
        plain = sparsek_attention(*inputs, topk=5, window=4, backend="triton")
    assert not asked and out.grad_fn is not None
    assert plain.grad_fn is None and torch.equal(out, plain)
