"""A carried state: any way to cut a sequence gives what the whole sequence gives."""

from __future__ import annotations

import pytest
import torch
from sparsek_kernels import (
    GATES,
    SparseKState,
    StateRows,
    attend_to_state,
    cache_bytes,
    sparsek_attention,
)
from state_pool import strided_pool

SETTINGS = [
    dict(topk=5, window=4, sinks=2),
    dict(topk=1, window=1, sinks=0),
    dict(topk=300, window=3, sinks=4),
    dict(topk=(0, 9), window=7, sinks=1),
    dict(topk=(20, 90), window=7, sinks=1),  # while neither head is full
    dict(topk=0, window=6, sinks=4),
    dict(topk=8, window=150, sinks=0),
]


def start(inputs, settings, rows=None):
    k = inputs[1]
    rows = k.shape[0] if rows is None else rows
    return SparseKState.empty(rows, k.shape[1], k.shape[3], dtype=k.dtype, **settings)


def feed(inputs, settings, cuts, state, **more):
    outs, at = [], 0
    for size in cuts:
        part = [x[:, :, at : at + size] for x in inputs]
        out, state = sparsek_attention(*part, state=state, **settings, **more)
        outs.append(out)
        at += size
    assert at == inputs[0].shape[2]
    return torch.cat(outs, 2), state


def content(state: SparseKState):
    """What each row and head holds, whatever the order of its slots."""
    expand = state.layout.expand(state.keys.device)
    held = []
    for row in range(state.batch):
        for head in range(state.layout.heads):
            slots = expand[head].unique()
            at = state.positions[row, slots]
            slots = slots[at >= 0][at[at >= 0].argsort()]
            held.append((state.positions[row, slots], state.keys[row, slots]))
    return held


# What is selected does not depend on the gate: the others meet ties alone, and all in slow-test.
KINDS = [
    pytest.param(
        kind, gate, marks=[pytest.mark.slow] if gate != GATES[0] and kind != "ties" else []
    )
    for kind in ("normal", "ties", "equal", "rising")
    for gate in GATES
]


@pytest.mark.parametrize(("kind", "gate"), KINDS)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_pieces_equal_the_whole(settings, kind, gate, make_inputs, relative_error):
    inputs = make_inputs(110, batch=2, heads=4, groups=2, kind=kind, grad=False)
    slopes = torch.tensor([0.0, 0.01]) if kind == "normal" else None
    more = dict(gate=gate, slopes=slopes)
    first_case = ("ties", SETTINGS[0])
    whole = sparsek_attention(*inputs, **settings, **more)
    once, final = feed(inputs, settings, [110], start(inputs, settings), **more)
    assert relative_error(once, whole) < 1e-12
    for cuts in ([1] * 110, [1, 45, 1, 1, 58, 4], [5] * 22, [109, 1]):
        if gate != "straight_through" and len(cuts) > 100 and (kind, settings) != first_case:
            continue  # one case shows that soft gates decode token by token, too
        pieces, state = feed(inputs, settings, cuts, start(inputs, settings), **more)
        assert relative_error(pieces, whole) < 1e-12, cuts
        assert state.seen.tolist() == [110, 110]
        for a, b in zip(content(state), content(final), strict=True):
            assert torch.equal(a[0], b[0])
            assert torch.equal(a[1], b[1])


@pytest.mark.parametrize("gate", GATES)
def test_rows_of_different_age(gate, make_inputs, relative_error):
    settings = dict(topk=6, window=5, sinks=2)
    lengths = [17, 0, 1, 40, 9]
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    packed = make_inputs(sum(lengths), heads=4, groups=2, grad=False, kind="ties")
    state = start(packed, settings, rows=5)
    first, state = sparsek_attention(*packed, cu_seqlens=bounds, state=state, gate=gate, **settings)
    assert state.seen.tolist() == lengths
    later = make_inputs(12, batch=5, heads=4, groups=2, grad=False, seed=1)
    second, state = feed(later, settings, [1, 1, 7, 1, 2], state, gate=gate)
    assert state.seen.tolist() == [length + 12 for length in lengths]
    for row, length in enumerate(lengths):
        a = int(bounds[row])
        whole = [
            torch.cat([x[:, :, a : a + length], y[row : row + 1]], 2)
            for x, y in zip(packed, later, strict=True)
        ]
        expected = sparsek_attention(*whole, gate=gate, **settings)
        assert relative_error(second[row : row + 1], expected[:, :, length:]) < 1e-12
        if length:
            got = first[:, :, a : a + length]
            assert relative_error(got, expected[:, :, :length]) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("topk", [6, (0, 2, 9)])
def test_bytes_are_the_formula_from_the_start(topk, dtype, make_inputs):
    settings = dict(topk=topk, window=8, sinks=4)
    inputs = make_inputs(200, batch=2, heads=3, groups=3, dim=8, grad=False, dtype=dtype)
    state = start(inputs, settings)
    expected = cache_bytes(2, topk, 8, 4, 3, 8, dtype)
    assert state.nbytes == expected
    for cuts in ([150, 30], [1] * 20):
        part = [x[:, :, : sum(cuts)] for x in inputs]
        _, state = feed(part, settings, cuts, state)
        assert state.nbytes == expected


def test_soft_gates_keep_scores_of_the_support_only(make_inputs):
    settings = dict(topk=6, window=8, sinks=4)
    inputs = make_inputs(200, grad=False)
    _, state = feed(inputs, settings, [200], start(inputs, settings), gate="log")
    alive = (state.support > -torch.inf).sum().item()
    assert 6 <= alive < 60
    assert (state.support[state.support > -torch.inf] > state.tau).all()
    assert state.keys.shape[1] == 18


@pytest.mark.parametrize("logits", [{}, {"scale": 0.7, "softcap": 2.0}], ids=["plain", "capped"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_other_queries_see_a_state_and_leave_it(settings, logits, make_inputs, relative_error):
    """A second layer that reads the first one's keys: what it would see had it inserted them."""
    q, *kept = make_inputs(40, batch=2, heads=4, groups=2, grad=False)
    other = torch.randn_like(q)
    state, own = start((q, *kept), settings), start((q, *kept), settings)
    for at in range(40):
        here = [x[:, :, at : at + 1] for x in (q, *kept)]
        out, state = sparsek_attention(*here, state=state, **settings, **logits)
        held = {name: x.clone() for name, x in state.slots.items()}
        assert relative_error(attend_to_state(here[0], state, **logits), out) < 1e-12
        query = other[:, :, at : at + 1]
        expected, own = sparsek_attention(query, *here[1:], state=own, **settings, **logits)
        assert relative_error(attend_to_state(query, state, **logits), expected) < 1e-12
        assert all(torch.equal(held[name], x) for name, x in state.slots.items())


def test_queries_that_do_not_fit_a_state(make_inputs):
    q, *kept = make_inputs(3, batch=2, heads=4, groups=2, grad=False)
    _, state = sparsek_attention(q, *kept, state=start((q, *kept), SETTINGS[0]), **SETTINGS[0])
    for wrong in (q, q[:1, :, :1], q[:, :3, :1], q[..., :1, :2]):
        with pytest.raises(ValueError, match="for this state|head size"):
            attend_to_state(wrong, state)


def test_selecting_and_copying_rows(make_inputs, relative_error):
    settings = dict(topk=4, window=3, sinks=1)
    inputs = make_inputs(30, batch=3, grad=False)
    _, state = feed([x[:, :, :20] for x in inputs], settings, [20], start(inputs, settings))
    rows = torch.tensor([2, 0, 0, 1])
    chosen = state.index_select(rows)
    copy = state.clone()
    rest = [x[rows, :, 20:] for x in inputs]
    out, _ = feed(rest, settings, [1] * 10, chosen)
    whole = sparsek_attention(*inputs, **settings)[rows, :, 20:]
    assert relative_error(out, whole) < 1e-12
    # The copies did not move with it.
    assert state.seen.tolist() == copy.seen.tolist() == [20, 20, 20]
    assert torch.equal(state.keys, copy.keys)
    back = SparseKState.cat([copy.index_select(torch.tensor([i])) for i in range(3)])
    assert torch.equal(back.keys, state.keys) and torch.equal(back.positions, state.positions)
    assert state.to("cpu").nbytes == state.nbytes


def test_beam_reorder_of_soft_support(make_inputs, relative_error):
    settings = dict(topk=4, window=3, sinks=1)
    inputs = make_inputs(30, batch=2, grad=False)
    _, state = feed(
        [x[:, :, :20] for x in inputs], settings, [20], start(inputs, settings), gate="log"
    )
    rows = torch.tensor([1, 1, 0])
    out, _ = feed([x[rows, :, 20:] for x in inputs], settings, [1] * 10,
                  state.index_select(rows), gate="log")  # fmt: skip
    whole = sparsek_attention(*inputs, gate="log", **settings)[rows, :, 20:]
    assert relative_error(out, whole) < 1e-12


def test_gradients_through_an_empty_state(make_inputs, relative_error):
    """A trainer that leaves the cache on gets the same gradients."""
    settings = dict(topk=6, window=5, sinks=2)
    for gate in GATES:
        inputs = make_inputs(90, heads=2, groups=1)
        plain = sparsek_attention(*inputs, gate=gate, **settings)
        expected = torch.autograd.grad(plain.square().sum(), inputs)
        out, state = sparsek_attention(
            *inputs, gate=gate, state=start(inputs, settings), **settings
        )
        for a, b in zip(torch.autograd.grad(out.square().sum(), inputs), expected, strict=True):
            assert relative_error(a, b) < 1e-12
        assert not state.keys.requires_grad and not state.scores.requires_grad


def test_gradients_behind_a_state_reach_the_new_tokens(make_inputs, relative_error):
    settings = dict(topk=6, window=5, sinks=2)
    inputs = make_inputs(60)
    old, new = [x[:, :, :40].detach() for x in inputs], [x[:, :, 40:] for x in inputs]
    _, state = sparsek_attention(*old, state=start(inputs, settings), **settings)
    out, _ = sparsek_attention(*new, state=state, **settings)
    grads = torch.autograd.grad(out.square().sum(), inputs, allow_unused=True)
    whole = [torch.cat([a, b], 2) for a, b in zip(old, new, strict=True)]
    plain = sparsek_attention(*whole, **settings)[:, :, 40:]
    expected = torch.autograd.grad(plain.square().sum(), inputs, allow_unused=True)
    for name, a, b in zip("qkv", grads[:3], expected[:3], strict=True):
        assert relative_error(a, b) < 1e-12, name
    # straight_through keeps no thresholds, hence no gradient of the scores behind a state.
    assert grads[3] is None or not grads[3].any()


def test_refusals(make_inputs):
    settings = dict(topk=4, window=3, sinks=1)
    inputs = make_inputs(10, grad=False)
    state = start(inputs, settings)
    with pytest.raises(ValueError, match="made for"):
        sparsek_attention(*inputs, topk=5, window=3, sinks=1, state=state)
    with pytest.raises(ValueError, match="rows"):
        sparsek_attention(*inputs, **settings, state=start(inputs, settings, rows=2))
    with pytest.raises(ValueError, match="dtype"):
        sparsek_attention(*(x.float() for x in inputs), **settings, state=state)
    _, state = sparsek_attention(*inputs, **settings, state=state)
    with pytest.raises(ValueError, match="straight_through"):
        sparsek_attention(*inputs, **settings, gate="log", state=state)
    with pytest.raises(ValueError):
        SparseKState.empty(1, 1, 4, topk=3, window=0)


@pytest.mark.parametrize("kept", [torch.float32, torch.int8], ids=["float32", "int8"])
@pytest.mark.parametrize("topk", [(6, 6), (0, 9)], ids=["uniform", "uneven"])
def test_rows_of_a_pool_are_filled_in_place(topk, kept, make_inputs):
    """Bit for bit what states of their own give, whatever an earlier owner left in the pool."""
    settings = dict(topk=topk, window=5, sinks=2)
    slopes = torch.tensor([0.0, 0.03])
    more = dict(**settings, slopes=slopes)
    pool = strided_pool(6, 2, 4, dtype=kept, **settings)
    untouched = pool.keys[[0, 2, 5]].clone()
    rows = torch.tensor([4, 1, 3], dtype=torch.int32)
    bounds = torch.tensor([0, 13, 14, 35], dtype=torch.int32)
    packed = make_inputs(35, heads=4, groups=2, grad=False, kind="ties", dtype=torch.float32)
    alone = SparseKState.empty(3, 2, 4, dtype=kept, **settings)
    expected, alone = sparsek_attention(*packed, cu_seqlens=bounds, state=alone, **more)
    fresh = StateRows(pool, rows, fresh=torch.ones(3, dtype=torch.bool))
    got, same = sparsek_attention(*packed, cu_seqlens=bounds, state=fresh, **more)
    assert same is fresh and torch.equal(got, expected)
    held = StateRows(pool, rows)
    later = make_inputs(30, batch=3, heads=4, groups=2, grad=False, seed=1, dtype=torch.float32)
    at = 0
    for size in (1, 1, 4, 1, 1, 2, *[1] * 20):
        part = [x[:, :, at : at + size] for x in later]
        expected, alone = sparsek_attention(*part, state=alone, **more)
        got, held = sparsek_attention(*part, state=held, **more)
        assert torch.equal(got, expected)
        at += size
    for name, tensor in held.take().slots.items():
        assert torch.equal(tensor, alone.slots[name]), name
    assert torch.equal(pool.keys[[0, 2, 5]].view(torch.uint8), untouched.view(torch.uint8))


def test_what_rows_of_a_pool_cannot_do(make_inputs):
    settings = dict(topk=(6, 6), window=5, sinks=2)
    pool = strided_pool(2, 2, 4, **settings)
    inputs = make_inputs(3, heads=4, groups=2, grad=False, dtype=torch.float32)
    rows = StateRows(pool, torch.tensor([1]), fresh=torch.tensor([True]))
    with pytest.raises(ValueError, match="no fixed size"):
        sparsek_attention(*inputs, state=rows, gate="log", **settings)
    with pytest.raises(ValueError, match="pass cu_seqlens"):
        sparsek_attention(*[x[:, :, :1] for x in inputs], state=rows, **settings)
    q = inputs[0].requires_grad_()
    with pytest.raises(ValueError, match="no_grad"):
        sparsek_attention(q, *inputs[1:], state=rows, **settings)
    assert pool.seen.tolist() == [7, 7]
