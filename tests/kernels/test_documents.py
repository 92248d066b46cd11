"""Packed documents: each is attended to as if it stood alone."""

from __future__ import annotations

import pytest
import torch
from sparsek_kernels import GATES, SparseKState, sparsek_attention

LENGTHS = [1, 40, 1, 1, 130, 7, 40, 2]
SETTINGS = dict(topk=6, window=5, sinks=2)


def bounds(lengths) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)


def alone(inputs, lengths, **settings) -> torch.Tensor:
    parts, at = [], 0
    for length in lengths:
        parts.append(sparsek_attention(*(x[:, :, at : at + length] for x in inputs), **settings))
        at += length
    return torch.cat(parts, 2)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("lengths", [LENGTHS, [60] * 4, [90], [1, 1], [0, 30, 0, 3, 0]], ids=str)
def test_packed_equals_alone(lengths, gate, make_inputs, relative_error):
    inputs = make_inputs(sum(lengths), heads=4, groups=2, kind="ties")
    slopes = torch.tensor([0.01, 0.0], dtype=torch.float64, requires_grad=True)
    settings = dict(SETTINGS, gate=gate, slopes=slopes)
    packed = sparsek_attention(*inputs, cu_seqlens=bounds(lengths), **settings)
    expected = alone(inputs, lengths, **settings)
    assert relative_error(packed, expected) < 1e-12
    leaves = [*inputs, slopes]
    ours = torch.autograd.grad(packed.square().sum(), leaves)
    reference = torch.autograd.grad(expected.square().sum(), leaves)
    for a, b in zip(ours, reference, strict=True):
        assert relative_error(a, b) < 1e-11


def test_chunks_of_documents_with_a_state(make_inputs, relative_error):
    """Documents grow by different amounts in each call, some by nothing."""
    first, second = [5, 0, 33, 1, 0], [9, 4, 0, 20, 0]
    inputs = make_inputs(sum(first) + sum(second), heads=4, groups=2, grad=False)
    head = [x[:, :, : sum(first)] for x in inputs]
    tail = [x[:, :, sum(first) :] for x in inputs]
    state = SparseKState.empty(5, 2, 4, dtype=torch.float64, **SETTINGS)
    a, state = sparsek_attention(*head, cu_seqlens=bounds(first), state=state, **SETTINGS)
    b, state = sparsek_attention(*tail, cu_seqlens=bounds(second), state=state, **SETTINGS)
    assert state.seen.tolist() == [14, 4, 33, 21, 0]
    for row in range(5):
        i, j = sum(first[:row]), sum(second[:row])
        n, m = first[row], second[row]
        whole = [
            torch.cat([x[:, :, i : i + n], y[:, :, j : j + m]], 2)
            for x, y in zip(head, tail, strict=True)
        ]
        expected = sparsek_attention(*whole, **SETTINGS)
        got = torch.cat([a[:, :, i : i + n], b[:, :, j : j + m]], 2)
        assert relative_error(got, expected) < 1e-12


def test_a_document_cannot_reach_another(make_inputs):
    lengths = [30, 50, 20]
    inputs = make_inputs(100, heads=2, groups=1, grad=False)
    before = sparsek_attention(*inputs, cu_seqlens=bounds(lengths), **SETTINGS)
    changed = [x.clone() for x in inputs]
    for x in changed:
        x[:, :, 30:80] += 5
    after = sparsek_attention(*changed, cu_seqlens=bounds(lengths), **SETTINGS)
    assert torch.equal(before[:, :, :30], after[:, :, :30])
    assert torch.equal(before[:, :, 80:], after[:, :, 80:])
    assert not torch.allclose(before[:, :, 30:80], after[:, :, 30:80])


def test_bounds_are_checked(make_inputs):
    inputs = make_inputs(10, grad=False)
    for wrong in ([0], [1, 10], [0, 9], [0, 7, 5, 10]):
        with pytest.raises(ValueError, match="cu_seqlens"):
            sparsek_attention(*inputs, cu_seqlens=torch.tensor(wrong), **SETTINGS)
    two = make_inputs(10, batch=2, grad=False)
    with pytest.raises(ValueError, match="batch"):
        sparsek_attention(*two, cu_seqlens=torch.tensor([0, 10]), **SETTINGS)
