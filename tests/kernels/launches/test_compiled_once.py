"""A server's steps differ in numbers and in places of tensors: kernels are compiled for neither."""

from __future__ import annotations

import pytest
import torch
from interpreted import replace_launches
from sparsek_kernels import SparseKState, StateRows

pytest.importorskip("triton")

SHAPE = dict(topk=(40, 90), window=32, sinks=4)


@pytest.fixture
def kinds(monkeypatch):
    """Kernel -> the kinds of arguments that an H200 would compile it for; none is launched."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget("cuda", 90, 32))
    seen: dict[str, set[str]] = {}

    def run(kernel, *args, grid, warmup, **options):
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        _, kind, _ = bind(*args, **options)
        seen.setdefault(kernel.fn.__name__, set()).add(str(kind))

    replace_launches(monkeypatch, run)
    return seen


@torch.no_grad()
def test_steps_that_read_are_compiled_for_once(kinds):
    """One document or several, of any lengths, behind any number of rows that decode."""
    from sparsek_kernels.triton.documents.listing import list_documents
    from sparsek_kernels.triton.state import first_slots, next_state

    pool = SparseKState.empty(9, 2, 64, dtype=torch.bfloat16, **SHAPE)
    starts = first_slots(pool.layout, torch.device("cpu"))
    rows = torch.arange(9, dtype=torch.int32)
    for before, lengths in ((0, (64,)), (1, (64, 33)), (3, (17,)), (0, (32, 16, 16))):
        n, count = sum(lengths), len(lengths)
        q, k, v = (
            torch.zeros(before + n, heads, 64, dtype=torch.bfloat16)[before:].transpose(0, 1)[None]
            for heads in (8, 2, 2)
        )
        scores = torch.zeros(2, before + n)[None, :, before:]
        bounds = torch.tensor([0, *lengths]).cumsum(0).int()
        fresh = torch.ones(before + count, dtype=torch.bool)[before:]
        state = StateRows(pool, rows[before : before + count], fresh)
        slopes = torch.zeros(2)
        keys, shape = list_documents(q, k, v, scores, slopes, bounds, pool.layout, state, starts)
        end = torch.zeros(keys.effective.shape, dtype=torch.int32)
        next_state(keys, pool.layout, end, shape, state)
    assert {name: len(found) for name, found in kinds.items()} == {
        "_list_documents": 1, "_leave_state": 1,
    }  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("count, kernel", [(3, "insert_and_attend"), (6, "insert")])
def test_rows_that_decode_beside_prompts_are_compiled_for_once(kinds, count, kernel):
    """Scores of a step lie as far apart as it has tokens, those of prompts included."""
    from sparsek_kernels.triton.decode.step import step

    pool = SparseKState.empty(9, 2, 64, dtype=torch.bfloat16, **SHAPE)
    blocks = torch.arange(20, dtype=torch.int32)
    for others in (0, 13, 58):
        q, k, v = (torch.zeros(count, heads, 1, 64, dtype=torch.bfloat16) for heads in (8, 2, 2))
        scores = torch.zeros(2, count + others)[:, :count].T[:, :, None]
        rows = StateRows(pool, blocks[others % 4 :][:count])
        step(q, k, v, scores, torch.zeros(2), rows, scale=1.0)
    assert len(kinds[kernel]) == 1 and all(len(found) == 1 for found in kinds.values())
