"""The custom ops: schema, fake versions, and one graph under torch.compile."""

import pytest
import torch
from sparsek_kernels.attention import sparsek_attention

pytestmark = pytest.mark.interpret


@pytest.mark.parametrize(
    "gate, softcap, own", [("straight_through", 2.0, torch.zeros(4)), ("kv", None, None)]
)
def test_fake_versions_describe_the_real_ones(make_inputs, gate, softcap, own):
    from sparsek_kernels.triton.ops import attention_op

    q, k, v, scores = make_inputs(20, heads=4, groups=2, dim=16, dtype=torch.float32, grad=False)
    torch.library.opcheck(
        attention_op,
        (q, k, v, scores.double(), own, None, [5, 4], 4, 1, gate, 0.25, softcap),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_compile_keeps_one_graph(make_inputs):
    inputs = make_inputs(30, heads=2, dim=16, dtype=torch.float32)

    def step(q, k, v, scores):
        return sparsek_attention(q * 2, k, v, scores, topk=5, window=4, backend="triton") + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for call in (compiled, step):
        out = call(*inputs)
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
