"""Learned pairs that join the softmax where tokens no longer fit: what stands in for them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparsek_kernels import GATES, SparseKState, StateRows, attend_to_state, sparsek_attention
from sparsek_kernels.naive.attention import naive_attention
from state_pool import strided_pool

HEADS, GROUPS = 4, 2
BUDGET = dict(topk=(8, 0), window=6, sinks=2)
SLOTS = (16, 8)
LOGITS = {
    "plain": {},
    "capped": dict(softcap=0.8),
    "sinks": dict(sink_logits=torch.tensor([-4.0, 0.0, 2.0, 1.0])),
    "both": dict(softcap=0.8, sink_logits=torch.tensor([-1.0, 0.5, 1.0, 0.0])),
}


def pairs(heads=HEADS, m=3, dim=4, *, dtype=torch.float64, bias=-1.0, seed=5) -> torch.Tensor:
    """[H, M, 2 D + 2]: biases about `bias`."""
    made = torch.randn(heads, m, 2 * dim + 2, generator=torch.Generator().manual_seed(seed))
    made[..., -2] += bias
    made[..., -1] += 2.5  # some limits are reached
    return made.to(dtype)


def in_pieces(inputs, sizes, state, options) -> torch.Tensor:
    """What a state and texts of these sizes, one after the other, put out."""
    outs = []
    for part in zip(*(x.split(sizes, 2) for x in inputs), strict=True):
        out, state = sparsek_attention(*part, state=state, fresh=not outs, **options)
        outs.append(out)
    return torch.cat(outs, 2)


def grads(out, leaves):
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    return torch.autograd.grad(out, leaves, weight)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("logits", LOGITS)
def test_forward_and_every_gradient(logits, gate, make_inputs, relative_error):
    """150 tokens are two tiles of queries, the last one not full."""
    logits = LOGITS[logits]
    inputs = make_inputs(150 if gate == "log" else 60, batch=2, heads=HEADS, groups=GROUPS)
    own = pairs().requires_grad_()
    leaves = [*inputs, own]
    if "sink_logits" in logits:
        sink = logits["sink_logits"].double().requires_grad_()
        logits, leaves = logits | {"sink_logits": sink}, [*leaves, sink]
    options = BUDGET | logits | {"gate": gate, "stand_ins": own}
    ours, twin = sparsek_attention(*inputs, **options), naive_attention(*inputs, **options)
    assert relative_error(ours, twin) < 1e-12
    with torch.no_grad():
        assert relative_error(sparsek_attention(*inputs, **options), twin) < 1e-12
    for number, (a, b) in enumerate(zip(grads(ours, leaves), grads(twin, leaves), strict=True)):
        assert b.abs().max() > 0
        assert relative_error(a, b) < 1e-11, number


@pytest.mark.parametrize("heads, groups", [(2, 2), (4, 2), (4, 1)])
@pytest.mark.parametrize("m, topk", [(1, 0), (1, 5), (3, 0), (3, 5)])
def test_heads_share_keys_but_no_stand_ins(heads, groups, m, topk, make_inputs, relative_error):
    inputs = make_inputs(140, batch=2, heads=heads, groups=groups)
    own = pairs(heads, m).requires_grad_()
    options = dict(topk=topk, window=4, sinks=1, stand_ins=own)
    twin = naive_attention(*inputs, **options)
    ours = sparsek_attention(*inputs, **options)
    assert relative_error(ours, twin) < 1e-12
    for a, b in zip(*(grads(out, [inputs[0], own]) for out in (ours, twin)), strict=True):
        assert relative_error(a, b) < 1e-11


def test_the_gradient_is_that_of_differences(make_inputs):
    inputs = make_inputs(12, heads=2, groups=1, grad=False)
    q, rest = inputs[0].requires_grad_(), inputs[1:]

    own = pairs(2, 2)
    learned, limits = own[..., :-1].clone().requires_grad_(), own[..., -1:]  # which are given

    def call(q, learned):
        whole = torch.cat([learned, limits], -1)
        return sparsek_attention(q, *rest, topk=2, window=3, sinks=1, stand_ins=whole)

    assert torch.autograd.gradcheck(call, (q, learned))


def test_what_is_missing_counts_up_to_a_limit(make_inputs):
    inputs = make_inputs(60, heads=2, groups=1, grad=False)
    own = pairs(2, 1)
    own[..., -1] = math.log(20)
    options = dict(topk=2, window=3, sinks=1)
    found = sparsek_attention(*inputs, stand_ins=own, **options)
    own[..., -1] = 30.0
    free = sparsek_attention(*inputs, stand_ins=own, **options)
    torch.testing.assert_close(found[:, :, :26], free[:, :, :26])  # 6 slots and 20 missing
    assert (found - free)[:, :, 27:].abs().amax(-1).min() > 0
    own[..., -2] += math.log(20)
    own[..., -1] = 0.0  # of any number
    most = sparsek_attention(*inputs, stand_ins=own, **options)
    torch.testing.assert_close(found[:, :, 25:], most[:, :, 25:])


@pytest.mark.parametrize(
    "dtype, own, tolerance",
    [(torch.bfloat16, torch.float32, 2e-2), (torch.float32, torch.float16, 1e-5)],
)
def test_number_formats_of_both(dtype, own, tolerance, make_inputs, relative_error):
    inputs = make_inputs(150, heads=HEADS, groups=GROUPS, dtype=dtype)
    own = pairs(dtype=own).requires_grad_()
    options = BUDGET | {"stand_ins": own}
    ours, twin = sparsek_attention(*inputs, **options), naive_attention(*inputs, **options)
    assert ours.dtype == dtype
    assert relative_error(ours, twin) < tolerance
    leaves = [inputs[0], own]
    for a, b, leaf in zip(grads(ours, leaves), grads(twin, leaves), leaves, strict=True):
        assert a.dtype == leaf.dtype
        assert relative_error(a, b) < max(tolerance, torch.finfo(leaf.dtype).eps) * 3


def test_autocast_leaves_them_their_precision(make_inputs, relative_error):
    """bf16 would round a bias and log n to some hundredths."""
    inputs = make_inputs(150, heads=HEADS, groups=GROUPS, dtype=torch.float32, grad=False)
    options = BUDGET | {"stand_ins": pairs(dtype=torch.float32)}
    state = SparseKState.empty(1, GROUPS, 4, **BUDGET)
    with torch.autocast("cpu", torch.bfloat16):
        whole = sparsek_attention(*inputs, **options)
        _, state = sparsek_attention(*(x[:, :, :149] for x in inputs), state=state, **options)
        last, _ = sparsek_attention(*(x[:, :, 149:] for x in inputs), state=state, **options)
    wanted = naive_attention(*inputs, **options)
    assert relative_error(whole, wanted) < 1e-5
    assert relative_error(last, wanted[:, :, 149:]) < 1e-5


def test_where_all_fits_they_are_not_there(make_inputs, relative_error):
    inputs = make_inputs(60, heads=HEADS, groups=GROUPS, grad=False)
    plain = sparsek_attention(*inputs, **BUDGET)
    out = sparsek_attention(*inputs, **BUDGET, stand_ins=pairs(bias=5.0))
    for group, slots in enumerate(SLOTS):
        heads = slice(2 * group, 2 * group + 2)
        assert relative_error(out[:, heads, :slots], plain[:, heads, :slots]) < 1e-13
        later = out[:, heads, slots:] - plain[:, heads, slots:]
        assert later.abs().amax(-1).min() > 1e-3


def test_a_dense_call_gives_them_a_gradient_of_zero(make_inputs, relative_error):
    inputs = make_inputs(min(SLOTS), heads=HEADS, groups=GROUPS, dtype=torch.float32)
    own = pairs(dtype=torch.float32)
    own[0, 0, -2] = -torch.inf
    own.requires_grad_()
    given = BUDGET | {"stand_ins": own}
    outs = [sparsek_attention(*inputs, **given, backend=name) for name in ("sdpa", "pytorch")]
    assert relative_error(*outs) < 1e-5
    for out in outs:
        assert torch.autograd.grad(out.square().sum(), own)[0].eq(0).all()


@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_pieces_equal_the_whole(logits, dtype, tolerance, make_inputs, relative_error):
    """Chunks, single tokens, the rows of a pool, and a layer that shares the keys."""
    logits, n = LOGITS[logits] | {"stand_ins": pairs(dim=8)}, 50
    inputs = make_inputs(
        n, batch=2, heads=HEADS, groups=GROUPS, dim=8, dtype=dtype, kind="ties", grad=False
    )
    whole = naive_attention(*inputs, **BUDGET, **logits)
    shape = (2, GROUPS, 8)
    state = SparseKState.empty(*shape, dtype=dtype, **BUDGET)
    pool = strided_pool(3, *shape[1:], dtype=dtype, **BUDGET)
    pooled = StateRows(pool, torch.tensor([2, 0]))
    outs, at = [], 0
    for size in (5, 18, 1, 1, 17, *[1] * 8):
        part = [x[:, :, at : at + size] for x in inputs]
        out, state = sparsek_attention(*part, state=state, **BUDGET, **logits)
        if at:
            same, _ = sparsek_attention(*part, state=pooled, **BUDGET, **logits)
            assert relative_error(same, out) < tolerance
        else:
            pooled.put(state)
        if size == 1:
            again = attend_to_state(part[0], state, **logits)
            assert relative_error(again, whole[:, :, at : at + 1]) < tolerance
        outs.append(out)
        at += size
    assert relative_error(torch.cat(outs, 2), whole) < tolerance


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.int8, 2e-2)], ids=["as_they_are", "8_bits"]
)
def test_single_tokens_from_the_first_one_on(dtype, tolerance, make_inputs, relative_error):
    """Stand-ins are never stored: beside 8-bit slots they are as exact as elsewhere."""
    inputs = make_inputs(40, heads=HEADS, groups=GROUPS, dim=16, dtype=torch.float32, grad=False)
    options = BUDGET | {"stand_ins": pairs(dim=16, bias=1.0)}
    state = SparseKState.empty(1, GROUPS, 16, dtype=dtype, **BUDGET)
    out = in_pieces(inputs, [1] * 30 + [3, 7], state, options)
    assert relative_error(out, naive_attention(*inputs, **options)) < tolerance


@pytest.mark.parametrize("gate", ["straight_through", "log"])
def test_a_gradient_through_a_carried_state(gate, make_inputs, relative_error):
    inputs = make_inputs(50, heads=HEADS, groups=GROUPS, grad=False)
    own = pairs().requires_grad_()
    options = BUDGET | {"stand_ins": own, "gate": gate}
    state = SparseKState.empty(1, GROUPS, 4, dtype=torch.float64, **BUDGET)
    ours = in_pieces(inputs, [30, 19, 1], state, options)
    twin = naive_attention(*inputs, **options)
    assert relative_error(ours, twin) < 1e-12
    assert relative_error(*(grads(out, [own])[0] for out in (ours, twin))) < 1e-11


def test_a_state_attended_to_gives_gradients(make_inputs, relative_error):
    inputs = make_inputs(30, heads=HEADS, groups=GROUPS, grad=False)
    state = SparseKState.empty(1, GROUPS, 4, dtype=torch.float64, **BUDGET)
    _, state = sparsek_attention(*inputs, state=state, **BUDGET)
    own, q = pairs().requires_grad_(), inputs[0].requires_grad_()
    twin = naive_attention(*inputs, **BUDGET, softcap=0.8, stand_ins=own)[:, :, -1:]
    out = attend_to_state(q[:, :, -1:], state, softcap=0.8, stand_ins=own)
    assert relative_error(out, twin) < 1e-12
    for a, b in zip(grads(out, [q, own]), grads(twin, [q, own]), strict=True):
        assert relative_error(a, b) < 1e-11


@pytest.mark.parametrize("gate", GATES)
def test_packed_documents_equal_separate_calls(gate, make_inputs, relative_error):
    """Each starts at place 0: one of 5 tokens has none, whatever lies before it."""
    bounds = [0, 1, 40, 40, 45, 97]
    inputs = make_inputs(97, heads=HEADS, groups=GROUPS)
    own = pairs().requires_grad_()
    options = BUDGET | {"stand_ins": own, "gate": gate}
    packed = sparsek_attention(*inputs, cu_seqlens=torch.tensor(bounds), **options)
    sizes = torch.tensor(bounds).diff().tolist()
    texts = [
        text for text in zip(*(x.split(sizes, 2) for x in inputs), strict=True) if text[0].shape[2]
    ]
    alone = torch.cat([naive_attention(*text, **options) for text in texts], 2)
    assert relative_error(packed, alone) < 1e-12
    leaves = [*inputs, own]
    for a, b in zip(grads(packed, leaves), grads(alone, leaves), strict=True):
        assert relative_error(a, b) < 1e-11


def test_documents_go_on_from_their_states(make_inputs, relative_error):
    """Rows of a pool that have seen 3, 20 and nothing (and hold rubbish) read on at once."""
    before, rows, options = (3, 20, 0), [2, 0, 3], BUDGET | {"stand_ins": pairs()}
    pool = strided_pool(4, GROUPS, 4, dtype=torch.float64, **BUDGET)
    given, wanted = [], []
    for row, seen, new in zip(rows, before, (30, 2, 12), strict=True):
        text = make_inputs(seen + new, heads=HEADS, groups=GROUPS, grad=False, seed=row)
        state = SparseKState.empty(1, GROUPS, 4, dtype=torch.float64, **BUDGET)
        past = [x[:, :, : seen or 10] for x in text]
        pool.put_row(row, sparsek_attention(*past, state=state, **options)[1])
        given.append([x[:, :, seen:] for x in text])
        wanted.append(naive_attention(*text, **options)[:, :, seen:])
    state = StateRows(pool, torch.tensor(rows), fresh=torch.tensor(before) == 0)
    packed = [torch.cat(parts, 2) for parts in zip(*given, strict=True)]
    bounds = torch.tensor([0, 30, 32, 44])
    out, _ = sparsek_attention(*packed, state=state, cu_seqlens=bounds, **options)
    assert relative_error(out, torch.cat(wanted, 2)) < 1e-12


def test_it_compiles_as_one_node(make_inputs, relative_error):
    inputs = make_inputs(40, heads=HEADS, groups=GROUPS, dtype=torch.float32)
    # A parameter may lie in memory in any order.
    own = pairs(dtype=torch.float32).transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()

    def call(*x):
        return sparsek_attention(*x[:4], stand_ins=x[4], **BUDGET)

    leaves = [*inputs, own]
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    out, wanted = compiled(*leaves), call(*leaves)
    assert relative_error(out, wanted) < 1e-6
    both = (torch.autograd.grad(x.square().sum(), leaves) for x in (out, wanted))
    for a, b in zip(*both, strict=True):
        assert relative_error(a, b) < 1e-5


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(1, 40), topk=st.lists(st.integers(0, 9), min_size=2, max_size=2),
    window=st.integers(1, 9), sinks=st.integers(0, 3), m=st.integers(1, 3),
    seed=st.integers(0, 999), gate=st.sampled_from(GATES), bias=st.sampled_from([-1e6, -1e30, 0]),
)  # fmt: skip
def test_they_do_what_they_say(n, topk, window, sinks, m, seed, gate, bias):
    """As the twin has it; with a very low bias, or where all fits, as if there were none."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, h, n, 4, generator=generator).double() for h in (4, 2, 2))
    scores = torch.randn(1, 2, n, generator=generator).double()
    own = pairs(4, m, bias=bias, seed=seed)
    options = dict(topk=topk, window=window, sinks=sinks, gate=gate)
    plain = sparsek_attention(q, k, v, scores, **options)
    found = sparsek_attention(q, k, v, scores, **options, stand_ins=own)
    twin = naive_attention(q, k, v, scores, **options, stand_ins=own)
    torch.testing.assert_close(found, twin, rtol=1e-9, atol=1e-11)
    if bias < 0 or n <= sinks + min(topk) + window:
        torch.testing.assert_close(found, plain, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("wrong", [(3, 2, 10), (4, 2, 9), (4, 0, 10), (4, 10)])
def test_what_does_not_fit_is_refused(wrong, make_inputs):
    q, *rest = make_inputs(1, heads=HEADS, groups=GROUPS, grad=False)
    state = SparseKState.empty(1, GROUPS, 4, dtype=torch.float64, **BUDGET)
    for call in (
        lambda own: sparsek_attention(q, *rest, **BUDGET, stand_ins=own),
        lambda own: attend_to_state(q, state, stand_ins=own),
    ):
        with pytest.raises(ValueError, match=r"stand_ins must be \[4, M, 10\] with M >= 1: key"):
            call(torch.zeros(wrong))
        with pytest.raises(TypeError, match="stand_ins must be a floating-point tensor"):
            call(torch.zeros(4, 1, 9, dtype=torch.int32))
    with pytest.raises(ValueError, match="under torch.no_grad"):
        rows, own = StateRows(state, torch.tensor([0])), pairs().requires_grad_()
        sparsek_attention(q, *rest, **BUDGET, state=rows, stand_ins=own)
