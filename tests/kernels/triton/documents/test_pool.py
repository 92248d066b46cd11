"""Documents that continue rows of a pool: read and left where they stand."""

import pytest
import torch
from sparsek_kernels import SparseKState, StateRows, sparsek_attention
from state_pool import strided_pool

pytestmark = pytest.mark.interpret

SHAPE = dict(topk=(5, 12), window=4, sinks=2)
OPTIONS = dict(slopes=torch.tensor([0.0, 0.02]), backend="triton", **SHAPE)


@pytest.mark.parametrize("kept", [torch.float32, torch.int8], ids=str)
@torch.no_grad()
def test_rows_of_a_pool_are_read_as_states_alone(kept):
    """To the bit, over whatever earlier owners left; rows that nobody named stay as they are."""
    new = torch.Generator().manual_seed(0)
    pool = strided_pool(6, 2, 16, dtype=kept, **SHAPE)
    for tensor in pool.slots.values():  # no NaN: it equals nothing
        tensor.fill_(float("inf") if tensor.is_floating_point() else 77)
    before = pool.clone()
    states = [SparseKState.empty(1, 2, 16, dtype=kept, **SHAPE) for _ in range(6)]
    begun = set()
    for rows, lengths in (([4, 1], [30, 3]), ([1, 2, 4], [9, 5, 1]), ([2, 5, 1], [0, 8, 21])):
        n = sum(lengths)
        tensors = [torch.randn(1, heads, n, 16, generator=new) for heads in (4, 2, 2)]
        tensors.append(torch.randint(0, 4, (1, 2, n), generator=new).float())
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        fresh = torch.tensor([row not in begun for row in rows])
        blocks = torch.tensor([rows, rows], dtype=torch.int32).T  # a column, as vLLM has them
        held = StateRows(pool, blocks[:, 0], fresh if fresh.any() else None)
        alone = SparseKState.cat([states[row] for row in rows])
        expected, alone = sparsek_attention(*tensors, cu_seqlens=bounds, state=alone, **OPTIONS)
        room = torch.full((1, n + 1, 4, 16), torch.nan)  # by token, as a model goes on with it
        wanted = room[:, :n].transpose(1, 2)
        out, back = sparsek_attention(
            *tensors, cu_seqlens=bounds, state=held, out=wanted, **OPTIONS
        )
        assert torch.equal(out, expected) and back is held
        assert out is wanted and room[:, n].isnan().all()
        for at, row in enumerate(rows):
            states[row] = alone.index_select(torch.tensor([at]))
            for name, tensor in pool.slots.items():
                assert torch.equal(tensor[row], alone.slots[name][at]), name
        begun |= set(rows)
    for name, tensor in pool.slots.items():
        assert torch.equal(tensor[[0, 3]], before.slots[name][[0, 3]]), name
