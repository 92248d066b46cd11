"""Reading several requests' tokens: packed in one launch, one after the other, or padded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from sparsek_kernels import SparseKState, StateRows, sparsek_attention

from sparsek_cli.benchmarks.case import Shape
from sparsek_cli.benchmarks.pool.rows import in_blocks
from sparsek_cli.benchmarks.timing import (
    interleaved_ms,
    peak_bytes,
    process_ms,
    waited_ms,
)

WAYS = ("one by one", "padded", "packed", "packed, in the pool")
# Relative, between ways that add up in another order.
TOLERANCE = {torch.bfloat16: 8e-3, torch.float32: 2e-5}
CYCLES = 2e9  # a second of the device's clock, or more
MOST_ASLEEP = 0.5  # seconds


class Took(NamedTuple):
    """Medians of a way: milliseconds until it is done, of the device alone; bytes it allocates.

    Off CUDA: CPU time of this process, and nothing else.
    """

    ms: float
    device_ms: float | None
    peak: int | None


class Reading:
    """New tokens of some requests, and the ways to read them.

    Args:
        lengths: tokens of each request.
        held: what the requests' rows hold already, a row each; None: nothing, they are new.
    """

    def __init__(
        self,
        shape: Shape,
        lengths: Sequence[int],
        held: SparseKState | None,
        new: torch.Generator,
    ):
        self.budget, self.lengths, self.fresh = shape.budget, list(lengths), held is None
        self.bounds = torch.tensor([0, *lengths], device=shape.device).cumsum(0).to(torch.int32)
        self.tokens = sum(lengths)
        heads = (shape.heads, shape.kv_heads, shape.kv_heads)
        self.packed = [
            torch.randn(
                1, count, self.tokens, shape.head_dim,
                generator=new, device=shape.device, dtype=shape.dtype,
            )
            for count in heads
        ]  # fmt: skip
        scores = (1, shape.kv_heads, self.tokens)
        self.packed.append(torch.randn(*scores, generator=new, device=shape.device))
        parts = [x.split(self.lengths, dim=2) for x in self.packed]
        self.alone = list(zip(*parts, strict=True))
        self.padded = [_padded(cut, max(lengths)) for cut in parts]
        if held is None:
            held = SparseKState.empty(
                len(self.lengths), shape.kv_heads, shape.head_dim, topk=shape.topk,
                window=shape.window, sinks=shape.sinks, dtype=shape.dtype, device=shape.device,
            )  # fmt: skip
        # Of each way its own: a call may change the state that it is given.
        self.held = {way: held.clone() for way in ("padded", "packed")}
        each = torch.arange(len(self.lengths), device=shape.device)
        self.own = [held.index_select(row) for row in each.split(1)]
        self.pool = in_blocks(held)
        self.rows = StateRows(self.pool, each, torch.full_like(each, self.fresh, dtype=torch.bool))

    @torch.no_grad()
    def run(self, way: str) -> tuple[torch.Tensor, SparseKState]:
        """(Outputs of all tokens [1, H, N, D], the states); those of `padded` are padded."""
        if way == "one by one":
            read = [
                sparsek_attention(*cut, state=own, fresh=self.fresh, **self.budget)
                for cut, own in zip(self.alone, self.own, strict=True)
            ]
            outs, states = zip(*read, strict=True)
            return torch.cat(outs, 2), SparseKState.cat(states)
        if way == "padded":
            held = self.held[way]
            return sparsek_attention(*self.padded, state=held, fresh=self.fresh, **self.budget)
        given = {"state": self.rows}  # says itself which are fresh
        if way == "packed":
            given = {"state": self.held[way], "fresh": self.fresh}
        return sparsek_attention(*self.packed, cu_seqlens=self.bounds, **given, **self.budget)

    def outputs(self, way: str, out: torch.Tensor) -> torch.Tensor:
        """What `run` gave for the tokens that are there, [1, H, N, D]."""
        if way != "padded":
            return out
        real = [row[None, :, :length] for row, length in zip(out, self.lengths, strict=True)]
        return torch.cat(real, 2)


def _padded(parts: Sequence[torch.Tensor], longest: int) -> torch.Tensor:
    """Requests [1, H, n, ...] as rows of one batch, with zeros behind their last tokens."""
    batch = parts[0].new_zeros(len(parts), parts[0].shape[1], longest, *parts[0].shape[3:])
    for row, part in zip(batch, parts, strict=True):
        row[:, : part.shape[2]] = part[0]
    return batch


def check(reading: Reading) -> None:
    """Raises RuntimeError unless all ways answer the same, and packed ones leave the same states.

    Sums come in another order in a longer row, so outputs agree within the dtype's rounding; the
    pool's to the bit with packed ones, and states to the bit with those of requests alone. Padding
    leaves no state that could be used, but in the longest row.
    """
    outs, states = {}, {}
    for way in WAYS:
        out, states[way] = reading.run(way)
        outs[way] = reading.outputs(way, out)
    states[WAYS[3]] = reading.pool
    expected = outs[WAYS[0]].double()
    for way in WAYS[1:]:
        error = ((outs[way].double() - expected).norm() / expected.norm()).item()
        if not error < TOLERANCE[outs[way].dtype]:
            raise RuntimeError(f"{way} answers otherwise than {WAYS[0]}: {error:.1e} of it")
    if not torch.equal(outs[WAYS[3]], outs[WAYS[2]]):
        raise RuntimeError(f"{WAYS[3]} answers otherwise than {WAYS[2]}")
    for way in WAYS[2:]:
        for name, tensor in states[WAYS[0]].slots.items():
            if not torch.equal(states[way].slots[name], tensor):
                raise RuntimeError(f"{way} leaves other {name} than {WAYS[0]}")


def measure(reading: Reading, device: torch.device, repeats: int) -> dict[str, Took]:
    """Medians of each way.

    Raises:
        RuntimeError: a way is wrong (see `check`).
    """
    check(reading)

    def reader(way: str) -> Callable[[], object]:
        return lambda: reading.run(way)

    calls = {way: reader(way) for way in WAYS}
    if device.type != "cuda":
        return {way: Took(ms, None, None) for way, ms in process_ms(calls, repeats).items()}
    until_done = waited_ms(calls, device, repeats)
    # The device sleeps for longer than any way takes as called: its launches are all queued then.
    ahead = int(CYCLES * min(1e-3 * max(until_done.values()), MOST_ASLEEP))
    alone = interleaved_ms(calls, device, repeats, ahead)
    return {way: Took(until_done[way], alone[way], peak_bytes(calls[way], device)) for way in WAYS}
