"""Decoding steps over rows of a pool: changed in place, or copied out and back."""

from __future__ import annotations

from collections.abc import Callable

import torch
from sparsek_kernels import SparseKState, StateRows, sparsek_attention

from sparsek_cli.benchmarks.case import Shape
from sparsek_cli.benchmarks.decode import filled_state
from sparsek_cli.benchmarks.timing import graphed, interleaved_ms, process_ms

WAYS = ("alone", "in place", "copied")
SETS = 8  # of rows, in turn: on CUDA no step finds its slots in the L2 cache
LINE = 16  # bytes at which a row's tensors start


def in_blocks(state: SparseKState) -> SparseKState:
    """A copy in which all tensors of a row lie in one block of bytes, as vLLM allocates them."""
    starts, size = {}, 0
    for name, tensor in state.slots.items():
        starts[name] = size
        size += -(-tensor[0].nbytes // LINE) * LINE
    blocks = torch.zeros(state.batch, size, dtype=torch.uint8, device=state.seen.device)
    views = {
        name: blocks[:, start : start + getattr(state, name)[0].nbytes]
        .view(getattr(state, name).dtype)
        .view(getattr(state, name).shape)
        for name, start in starts.items()
    }
    pool = SparseKState(layout=state.layout, **views)
    pool.copy_(state)
    return pool


def filled_pool(shape: Shape, new: torch.Generator) -> SparseKState:
    """`shape.batch` rows whose slots are full, in blocks."""
    slots = shape.topk + shape.window + shape.sinks
    return in_blocks(filled_state(shape, 4 * slots, new))


class Step:
    """One decoding step of `shape.batch` requests, and the ways to compute it over a pool."""

    def __init__(self, shape: Shape, new: torch.Generator):
        self.budget = shape.budget
        heads = (shape.heads, shape.kv_heads, shape.kv_heads)
        self.inputs = [
            torch.randn(
                shape.batch, count, 1, shape.head_dim,
                generator=new, device=shape.device, dtype=shape.dtype,
            )
            for count in heads
        ]  # fmt: skip
        scores = (shape.batch, shape.kv_heads, 1)
        self.inputs.append(torch.randn(*scores, generator=new, device=shape.device))

    def _attend(self, state):
        return sparsek_attention(*self.inputs, state=state, **self.budget)

    @torch.no_grad()
    def run(self, way: str, pool: SparseKState, rows: torch.Tensor) -> torch.Tensor:
        """The step's answer; `pool`, or with "alone" a state of only these rows, changes."""
        if way == "in place":
            return self._attend(StateRows(pool, rows))[0]
        if way == "copied":
            out, state = self._attend(pool.index_select(rows))
            StateRows(pool, rows).put(state)
            return out
        return self._attend(pool)[0]


def check(step: Step, pool: SparseKState, rows: torch.Tensor) -> None:
    """Raises RuntimeError unless all ways answer the same and leave the same in these rows."""
    pools = {way: in_blocks(pool) for way in WAYS}
    pools["alone"] = pool.index_select(rows)
    outs = {way: step.run(way, held, rows) for way, held in pools.items()}
    for way in WAYS[1:]:
        if not torch.equal(outs[way], outs["alone"]):
            raise RuntimeError(f"{way} answers otherwise than a state of its own")
        for name, tensor in pools[way].slots.items():
            expected = pool.slots[name].index_copy(0, rows, pools["alone"].slots[name])
            if not torch.equal(tensor, expected):
                raise RuntimeError(f"{way} leaves other {name} than a state of its own")


def measure(
    shape: Shape, pool: SparseKState, repeats: int, new: torch.Generator
) -> dict[str, float]:
    """Median milliseconds of each way for `shape.batch` rows of the pool; they are used up.

    Raises:
        RuntimeError: a way is wrong (see `check`).
    """
    cuda = shape.device.type == "cuda"
    step = Step(shape, new)
    sets = torch.randperm(pool.batch, generator=new, device=shape.device).split(shape.batch)
    sets = [rows for rows in sets if len(rows) == shape.batch][: SETS if cuda else 1]
    check(step, pool, sets[0])
    alone = [pool.index_select(rows) for rows in sets]

    def over(way: str) -> Callable[[], object]:
        def call() -> None:
            for rows, own in zip(sets, alone, strict=True):
                step.run(way, own if way == "alone" else pool, rows)

        return graphed(call) if cuda else call

    calls = {way: over(way) for way in WAYS}
    took = interleaved_ms(calls, shape.device, repeats) if cuda else process_ms(calls, repeats)
    return {way: ms / len(sets) for way, ms in took.items()}
