"""The 8-bit cache: the same pairs are kept, each number to half a step of its row's scale."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sparsek_kernels import SparseKState, cache_bytes, sparsek_attention
from sparsek_kernels.quantization import LARGEST, dequantize, quantize

SETTINGS = [
    dict(topk=5, window=4, sinks=2),
    dict(topk=(0, 9), window=7, sinks=1),
    dict(topk=300, window=3, sinks=0),
]
CUTS = ([60], [1] * 60, [7, 1, 1, 30, 1, 20])


@given(
    st.lists(
        st.floats(-(2.0**90), 2.0**90, allow_subnormal=False, width=32), min_size=1, max_size=20
    ),
    st.integers(0, 5),
)
def test_each_number_is_kept_to_half_a_step(numbers, rows):
    x = torch.tensor(numbers).expand(rows, -1)
    codes, scale = quantize(x)
    assert codes.dtype == torch.int8 and codes.shape == x.shape and scale.shape == x.shape[:-1]
    back = dequantize(codes, scale, torch.float32)
    assert bool(((back - x).abs() <= scale[:, None] * 0.5001).all())
    if rows and x.abs().max() > 1e-30:
        assert codes.abs().max() == LARGEST


def test_zeros_stay_zeros():
    codes, scale = quantize(torch.zeros(3, 4))
    assert not dequantize(codes, scale, torch.float32).any()


def fill(inputs, settings, cuts, dtype, backend="pytorch"):
    """(outputs, state) of a fresh state that reads `inputs` in pieces."""
    k = inputs[1]
    state = SparseKState.empty(k.shape[0], k.shape[1], k.shape[3], dtype=dtype, **settings)
    outs, at = [], 0
    for size in cuts:
        part = [x[:, :, at : at + size] for x in inputs]
        out, state = sparsek_attention(*part, state=state, backend=backend, **settings)
        outs.append(out)
        at += size
    return torch.cat(outs, 2), state


def seen_by_last_query(q, state, head):
    """Attention of the last query [R, D] of one KV head over its slots, dequantised."""
    slots = state.layout.expand(q.device)[head].unique()
    slots = slots[state.positions[0, slots] >= 0]
    keys = dequantize(state.keys[0, slots], state.key_scale[0, slots], torch.float64)
    values = dequantize(state.values[0, slots], state.value_scale[0, slots], torch.float64)
    return torch.softmax(q @ keys.T / q.shape[-1] ** 0.5, -1) @ values


@pytest.mark.parametrize("cuts", CUTS, ids=len)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_same_pairs_are_kept_whatever_the_cuts(settings, cuts, make_inputs, relative_error):
    inputs = make_inputs(60, heads=4, groups=2, kind="ties", grad=False)
    exact, full = fill(inputs, settings, cuts, inputs[1].dtype)
    out, state = fill(inputs, settings, cuts, torch.int8)
    assert state.quantized and state.nbytes < full.nbytes
    for head in range(2):
        slots = state.layout.expand(torch.device("cpu"))[head].unique()
        at, expected = (s.positions[0, slots].sort() for s in (state, full))
        assert torch.equal(at.values, expected.values)
        held = at.values >= 0
        where = slots[at.indices][held]
        keys = inputs[1][0, head, at.values[held].long()]
        codes, scale = quantize(keys)  # once, from the key itself: nothing drifted
        assert torch.equal(state.keys[0, where], codes)
        assert torch.equal(state.key_scale[0, where], scale)
    error = relative_error(out[:, :, -1:], exact[:, :, -1:])
    assert error < 0.03 and (error > 0) == (len(cuts) > 1)  # one call sees its own keys exactly


def test_a_step_attends_to_what_the_state_holds(make_inputs, relative_error):
    settings = dict(topk=(0, 9), window=7, sinks=1)
    inputs = make_inputs(40, heads=4, groups=2, grad=False)
    out, state = fill(inputs, settings, [39, 1], torch.int8)
    for head in range(2):
        queries = inputs[0][0, 2 * head : 2 * head + 2, -1]
        expected = seen_by_last_query(queries, state, head)
        assert relative_error(out[0, 2 * head : 2 * head + 2, -1], expected) < 1e-12


def test_bytes_rows_and_copies(make_inputs):
    settings = dict(topk=(0, 9), window=7, sinks=1)
    inputs = make_inputs(30, batch=3, heads=4, groups=2, dim=8, grad=False)
    _, state = fill(inputs, settings, [29, 1], torch.int8)
    assert state.nbytes == cache_bytes(3, (0, 9), 7, 1, 2, 8, torch.int8)
    chosen = state.index_select(torch.tensor([2, 0]))
    assert torch.equal(chosen.key_scale, state.key_scale[[2, 0]])
    other = SparseKState.empty(3, 2, 8, dtype=torch.int8, **settings)
    other.copy_(state)
    other.put_row(0, chosen)
    assert torch.equal(other.value_scale[0], state.value_scale[2])
    assert torch.equal(other.values[1:], state.values[1:])


def test_another_dtype_is_still_refused(make_inputs):
    settings = dict(topk=4, window=3, sinks=1)
    inputs = make_inputs(5, grad=False)
    k = inputs[1]
    state = SparseKState.empty(1, k.shape[1], k.shape[3], dtype=torch.bfloat16, **settings)
    with pytest.raises(ValueError, match="dtype"):
        sparsek_attention(*inputs, state=state, **settings)


@pytest.mark.interpret
def test_triton_writes_the_same_codes(relative_error, monkeypatch):
    from sparsek_kernels.triton.decode import attend

    monkeypatch.setattr(attend, "LEAST_SLOTS", 4)  # several programs share a head's slots
    new = torch.Generator().manual_seed(1)
    settings, n = dict(topk=(0, 6), window=4, sinks=2), 30
    q = torch.randn(2, 4, n, 16, generator=new)
    k, v = (torch.randn(2, 2, n, 16, generator=new) for _ in range(2))
    k[:, :, 7] = 0  # a row without any scale
    scores = torch.randint(0, 4, (2, 2, n), generator=new).float()
    cuts = [9, *[1] * 15, 5, 1]
    outs, states = zip(
        *(fill((q, k, v, scores), settings, cuts, torch.int8, b) for b in ("triton", "pytorch")),
        strict=True,
    )
    assert relative_error(outs[0], outs[1]) < 1e-5
    order = [state.positions.to(torch.int64).argsort(dim=1, stable=True) for state in states]
    for name in states[0].slots.keys() - {"seen", "scores"}:
        a, b = (
            getattr(state, name).gather(1, at) if getattr(state, name).dim() == 2 else
            getattr(state, name).gather(1, at[..., None].expand(-1, -1, 16))
            for state, at in zip(states, order, strict=True)
        )  # fmt: skip
        assert torch.equal(a, b), name
