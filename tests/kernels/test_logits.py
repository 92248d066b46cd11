"""Logits that are capped softly, and one further logit per head: attention to nothing."""

from __future__ import annotations

import pytest
import torch
from sparsek_kernels import GATES, SparseKState, StateRows, sparsek_attention
from sparsek_kernels.naive.attention import naive_attention
from state_pool import strided_pool

HEADS, GROUPS = 4, 2
# A cap that bends most logits, sinks from negligible to overwhelming.
CAP = 0.8
LOGITS = {
    "capped": dict(softcap=CAP),
    "sinks": dict(sink_logits=torch.tensor([-4.0, 0.0, 2.0, 30.0])),
    "both": dict(softcap=CAP, sink_logits=torch.tensor([-1.0, 0.5, 1.0, 0.0])),
}
BUDGET = dict(topk=(9, 4), window=6, sinks=2)


@pytest.fixture(params=LOGITS)
def logits(request) -> dict:
    return LOGITS[request.param]


@pytest.mark.parametrize("gate", GATES)
def test_forward_and_every_gradient(logits, gate, make_inputs, relative_error):
    """150 tokens are two tiles of queries, the last one not full."""
    inputs = make_inputs(150 if gate == "log" else 60, batch=2, heads=HEADS, groups=GROUPS)
    leaves = list(inputs)
    if "sink_logits" in logits:
        own = logits["sink_logits"].double().requires_grad_()
        logits, leaves = logits | {"sink_logits": own}, [*leaves, own]
    settings = BUDGET | logits | {"gate": gate}
    ours, twin = sparsek_attention(*inputs, **settings), naive_attention(*inputs, **settings)
    assert relative_error(ours, twin) < 1e-12
    with torch.no_grad():
        assert relative_error(sparsek_attention(*inputs, **settings), twin) < 1e-12
    weight = torch.randn(twin.shape, generator=torch.Generator().manual_seed(9)).double()
    mine, theirs = (torch.autograd.grad(out, leaves, weight) for out in (ours, twin))
    for number, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        assert b.abs().max() > 0
        assert relative_error(a, b) < 1e-11, number


def test_they_change_the_output(logits, make_inputs, relative_error):
    inputs = make_inputs(40, heads=HEADS, groups=GROUPS, grad=False)
    plain = sparsek_attention(*inputs, **BUDGET)
    assert relative_error(sparsek_attention(*inputs, **BUDGET, **logits), plain) > 0.01


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_pieces_equal_the_whole(logits, dtype, tolerance, make_inputs, relative_error):
    """Chunks, single tokens, and the rows of a pool."""
    n = 50
    inputs = make_inputs(
        n, batch=2, heads=HEADS, groups=GROUPS, dim=8, dtype=dtype, kind="ties", grad=False
    )
    whole = naive_attention(*inputs, **BUDGET, **logits)
    shape = (2, GROUPS, 8)
    state = SparseKState.empty(*shape, dtype=dtype, **BUDGET)
    pool = strided_pool(3, *shape[1:], dtype=dtype, **BUDGET)
    pooled = StateRows(pool, torch.tensor([2, 0]))
    outs, at = [], 0
    for size in (23, 1, 1, 17, *[1] * 8):
        part = [x[:, :, at : at + size] for x in inputs]
        out, state = sparsek_attention(*part, state=state, **BUDGET, **logits)
        if at:
            same, _ = sparsek_attention(*part, state=pooled, **BUDGET, **logits)
            assert relative_error(same, out) < tolerance
        else:
            pooled.put(state)
        outs.append(out)
        at += size
    assert at == n
    assert relative_error(torch.cat(outs, 2), whole) < tolerance


def test_packed_documents_equal_separate_calls(logits, make_inputs, relative_error):
    bounds = [0, 1, 40, 40, 97]
    inputs = make_inputs(97, heads=HEADS, groups=GROUPS, grad=False)
    packed = sparsek_attention(*inputs, cu_seqlens=torch.tensor(bounds), **BUDGET, **logits)
    alone = [
        naive_attention(*(x[:, :, a:b] for x in inputs), **BUDGET, **logits)
        for a, b in zip(bounds, bounds[1:], strict=False)
        if a < b
    ]
    assert relative_error(packed, torch.cat(alone, 2)) < 1e-12


def test_everything_selected_is_a_plain_softmax(logits, make_inputs, relative_error):
    """Written out once more, as transformers' gemma2 and gpt_oss do."""
    q, k, v, scores = make_inputs(50, heads=HEADS, groups=GROUPS, grad=False)
    x = q @ k.repeat_interleave(HEADS // GROUPS, 1).transpose(2, 3) * 0.5
    if "softcap" in logits:
        x = torch.tanh(x / logits["softcap"]) * logits["softcap"]
    x = x.masked_fill(torch.ones(50, 50).triu(1).bool(), -torch.inf)
    if "sink_logits" in logits:
        x = torch.cat([x, logits["sink_logits"].view(1, -1, 1, 1).expand(1, -1, 50, 1)], 3)
    wanted = x.softmax(3)[..., :50] @ v.repeat_interleave(HEADS // GROUPS, 1)
    out = sparsek_attention(q, k, v, scores, topk=50, window=3, **logits)
    assert relative_error(out, wanted) < 1e-12


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(softcap=0.0), "softcap must be positive"),
        (dict(softcap=float("nan")), "softcap must be positive"),
        (dict(sink_logits=torch.zeros(3)), r"sink_logits must be \[4\]"),
        (dict(backend="sdpa", softcap=1.0), "no softcap and no sink_logits"),
    ],
)
def test_what_does_not_fit_is_refused(wrong, message, make_inputs):
    inputs = make_inputs(5, heads=HEADS, groups=GROUPS, grad=False, dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        sparsek_attention(*inputs, **BUDGET, **wrong)


def test_it_compiles_as_one_node(make_inputs, relative_error):
    inputs = make_inputs(40, heads=HEADS, groups=GROUPS, dtype=torch.float32)
    own = torch.zeros(HEADS, requires_grad=True)

    def call(*x):
        return sparsek_attention(*x[:4], sink_logits=x[4], softcap=CAP, **BUDGET)

    leaves = [*inputs, own]
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    out, wanted = compiled(*leaves), call(*leaves)
    assert relative_error(out, wanted) < 1e-6
    both = (torch.autograd.grad(x.square().sum(), leaves) for x in (out, wanted))
    for a, b in zip(*both, strict=True):
        assert relative_error(a, b) < 1e-5
