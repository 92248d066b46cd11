"""A layer over a pool of states: ways are timed where they agree, and nowhere else."""

import re
import sys

import pytest
import torch
from sparsek_kernels import StateRows

from sparsek_cli.benchmarks.case import Shape
from sparsek_cli.benchmarks.pool import __main__ as table
from sparsek_cli.benchmarks.pool import reading, rows

SIZE = dict(heads=4, kv_heads=2, head_dim=16, topk=12, window=8, sinks=2)
CPU = torch.device("cpu")


def of_size(batch):
    fixed = dict(gate="straight_through", dtype=torch.float32, device=CPU, seed=0)
    return Shape(**SIZE, **fixed, batch=batch)


def step(new):
    return rows.measure(of_size(3), rows.filled_pool(of_size(6), new), 1, new)


def prompts(new):
    return reading.measure(reading.Reading(of_size(3), (50, 2, 9), None, new), CPU, 1)


def pieces(new):
    held = rows.filled_pool(of_size(3), new)
    return reading.measure(reading.Reading(of_size(3), (5, 2, 9), held, new), CPU, 1)


@pytest.fixture
def new():
    return torch.Generator().manual_seed(0)


def test_steps_of_both_ways_agree_with_a_state_of_its_own_and_are_timed(new):
    took = step(new)
    assert list(took) == ["alone", "in place", "copied"] and all(ms > 0 for ms in took.values())


@pytest.mark.parametrize("read", [prompts, pieces])
def test_requests_are_read_alike_by_all_ways_and_timed(read, new):
    took = read(new)
    assert list(took) == list(reading.WAYS) and all(way.ms > 0 for way in took.values())


@pytest.mark.interpret
@pytest.mark.parametrize("read", [step, prompts, pieces])
def test_our_kernels_pass_the_same_checks(read, new, monkeypatch):
    budget = Shape.budget.fget
    monkeypatch.setattr(Shape, "budget", property(lambda own: budget(own) | {"backend": "triton"}))
    for module in (reading, rows):  # how long an interpreter takes says nothing
        monkeypatch.setattr(module, "process_ms", lambda calls, repeats: dict.fromkeys(calls, 1.0))
    assert read(new)


@pytest.mark.parametrize("read", [step, prompts, pieces])
def test_a_way_that_leaves_something_else_is_not_timed(read, new, monkeypatch):
    monkeypatch.setattr(StateRows, "put", lambda *_: None)
    with pytest.raises(RuntimeError, match="leaves other"):
        read(new)


def test_a_way_that_answers_otherwise_is_not_timed(new, monkeypatch):
    read = reading.Reading(of_size(3), (5, 2, 9), None, new)
    read.packed[0] = read.packed[0] + 0.01
    with pytest.raises(RuntimeError, match="packed answers otherwise than one by one"):
        reading.check(read)


def test_a_rows_tensors_lie_in_one_block_and_keep_what_they_held(new):
    state = rows.filled_state(of_size(3), 90, new)
    pool = rows.in_blocks(state)
    for name, tensor in state.slots.items():
        assert torch.equal(pool.slots[name], tensor)
        assert pool.slots[name].stride(0) > tensor.stride(0)


def test_the_tables_have_a_line_for_each_way(new, monkeypatch, capsys):
    monkeypatch.setitem(table.LAYERS, "toy", SIZE)
    given = "--toy --rows 1,2 --prompts 40,3 --pieces 5,2 --repeats 1"
    monkeypatch.setattr(sys, "argv", ["pool", *given.split()])
    table.main()
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if re.match(r"\| rows that decode: [12] \|", line)]) == 2
    for way in reading.WAYS:
        assert len([line for line in lines if f"| {way} |" in line]) == 2
