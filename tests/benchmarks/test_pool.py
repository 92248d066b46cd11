"""A layer over a pool of states: both ways are timed where they agree, and nowhere else."""

import pytest
import torch
from sparsek_kernels import StateRows

from sparsek_cli.benchmarks import pool as bench
from sparsek_cli.benchmarks.case import Shape
from sparsek_cli.benchmarks.decode import filled_state

SIZE = dict(heads=4, kv_heads=2, head_dim=8, topk=12, window=8, sinks=2)
CPU = torch.device("cpu")


def measure(pieces):
    rows = 3 if pieces is None else len(pieces)
    fixed = dict(gate="straight_through", dtype=torch.float32, device=CPU, seed=0)
    new = torch.Generator().manual_seed(0)
    pool = filled_state(Shape(**SIZE, **fixed, batch=6), 60, new)
    shape = Shape(**SIZE, **fixed, batch=rows)
    return bench.measure(shape, pool, pieces, 1, new)


@pytest.mark.parametrize("pieces", [None, (5, 1, 9)])
def test_both_ways_agree_with_a_state_of_its_own_and_are_timed(pieces):
    took = measure(pieces)
    assert list(took) == ["alone", "in place", "copied"] and all(ms > 0 for ms in took.values())


@pytest.mark.parametrize("pieces", [None, (5, 1, 9)])
def test_a_way_that_leaves_something_else_is_not_timed(pieces, monkeypatch):
    monkeypatch.setattr(StateRows, "put", lambda *_: None)
    with pytest.raises(RuntimeError, match="leaves other"):
        measure(pieces)
