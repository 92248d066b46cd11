"""Whole calls by the ways of short ones and by those of long ones: the same bits."""

import pytest
import torch
from sparsek_kernels import SparseKState, StateRows, sparsek_attention
from sparsek_kernels.dispatch import as_if_long


def read_in_pieces(n=150, dim=16, dtype=torch.float32, device="cpu", batch=1, **shape):
    """Outputs and states of rows read in pieces, of rows of a pool, and of packed documents."""
    shape = shape or dict(topk=(20, 3), window=7, sinks=2)
    draw = torch.Generator(device).manual_seed(0)
    made = {"generator": draw, "device": device}
    slopes = torch.tensor([0.0, 0.02], device=device)
    options = dict(**shape, slopes=slopes, backend="triton")
    kept = {"dtype": dtype, "device": device}
    state = SparseKState.empty(batch, 2, dim, **kept, **shape)
    pool = SparseKState.empty(3, 2, dim, **kept, **shape)
    bounds = torch.tensor([0, n // 4, n], device=device)
    rows = torch.tensor([2, 0], device=device)
    found = []
    for fresh in (True, False):
        q = torch.randn(batch, 4, n, dim, **made).to(dtype)
        k, v = (torch.randn(batch, 2, n, dim, **made).to(dtype) for _ in range(2))
        scores = torch.randint(0, n // 15, (batch, 2, n), **made).float()  # many tie
        whole, state = sparsek_attention(q, k, v, scores, state=state, fresh=fresh, **options)
        flags = torch.tensor([fresh, fresh], device=device)
        one, documents = [x[:1] for x in (q, k, v, scores)], {"cu_seqlens": bounds}
        packed, _ = sparsek_attention(
            *one, state=StateRows(pool, rows, flags), **documents, **options
        )  # fmt: skip
        found += [whole, packed, sparsek_attention(*one, **documents, **options)]
        found.append(sparsek_attention(q, k, v, scores, **options))
    return [*found, *state.slots.values(), *pool.slots.values()]


@pytest.mark.interpret
@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2])
def test_a_call_finds_the_same_bits_both_ways(batch):
    with as_if_long():
        expected = read_in_pieces(batch=batch)
    found = read_in_pieces(batch=batch)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("n, batch", [(300, 2), (1024, 1), (4096, 1), (3000, 2), (9000, 1)])
@pytest.mark.parametrize("dim, dtype", [(64, torch.bfloat16), (128, torch.float32)])
def test_calls_of_real_sizes_find_the_same_bits_on_a_gpu(n, batch, dim, dtype):
    shape = dict(topk=(380, 90), window=128, sinks=4)
    given = dict(n=n, batch=batch, dim=dim, dtype=dtype, device="cuda", **shape)
    with as_if_long():
        expected = read_in_pieces(**given)
    assert all(torch.equal(a, b) for a, b in zip(read_in_pieces(**given), expected, strict=True))
