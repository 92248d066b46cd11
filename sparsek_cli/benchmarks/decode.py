"""One decoding step of one layer, as a CUDA graph, beside dense attention over the whole cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from sparsek_kernels import SparseKState, sparsek_attention
from torch.nn import functional as F

from sparsek_cli.benchmarks.case import Shape
from sparsek_cli.benchmarks.timing import copy_bandwidth, graphed, interleaved_ms

SETS = 4  # independent states, so that no step finds its slots in the L2 cache


def filled_state(shape: Shape, length: int, generator: torch.Generator) -> SparseKState:
    """A state as it stands after `length` tokens: full slots, random contents."""
    state = SparseKState.empty(
        shape.batch, shape.kv_heads, shape.head_dim, topk=shape.topk, window=shape.window,
        sinks=shape.sinks, dtype=shape.dtype, device=shape.device,
    )  # fmt: skip
    for tensor in (state.keys, state.values, state.scores):
        tensor.normal_(generator=generator)
    first = 0
    old = length - shape.window - shape.sinks
    for k in state.layout.topk:
        held = torch.randperm(old, device="cpu")[:k].sort().values + shape.sinks
        near = torch.arange(length - shape.window, length)
        ring = torch.empty_like(near)
        ring[near % shape.window] = near
        slots = torch.cat([torch.arange(shape.sinks), held, ring]).int()
        state.positions[:, first : first + len(slots)] = slots.to(shape.device)
        first += len(slots)
    state.seen.fill_(length)
    return state


def measure(
    lengths: Iterable[int],
    shape: Shape,
    *,
    dense: bool,
    repeats: int,
    say: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """One row per context length: microseconds per step, ratio, share of the copy bandwidth."""
    cuda = shape.device.type == "cuda"
    bandwidth = copy_bandwidth(shape.device) if cuda else None
    generator = torch.Generator(shape.device).manual_seed(shape.seed)
    new = lambda heads: torch.randn(  # noqa: E731
        shape.batch, heads, 1, shape.head_dim,
        device=shape.device, dtype=shape.dtype, generator=generator,
    )  # fmt: skip
    for length in lengths:
        if length <= shape.sinks + shape.topk + shape.window:
            say(f"decode at {length}: the slots are not full yet, skipped")
            continue
        states = [filled_state(shape, length, generator) for _ in range(SETS if cuda else 1)]
        q, k, v = new(shape.heads), new(shape.kv_heads), new(shape.kv_heads)
        scores = torch.randn(shape.batch, shape.kv_heads, 1, device=shape.device)

        @torch.no_grad()
        def sparse(states=states, q=q, k=k, v=v, scores=scores) -> None:
            for state in states:
                sparsek_attention(q, k, v, scores, state=state, **shape.budget)

        calls = {"sparsek": graphed(sparse) if cuda else sparse}
        missing = {}
        if dense:
            try:
                calls["sdpa"] = _dense(shape, length, q, len(states), generator)
            except torch.OutOfMemoryError:
                missing["sdpa"] = "out of memory"
        ms = {
            name: time / len(states)
            for name, time in interleaved_ms(calls, shape.device, repeats).items()
        }
        state_bytes = states[0].keys.nbytes + states[0].values.nbytes
        rate = state_bytes / ms["sparsek"] * 1e3
        yield {
            "length": length,
            "ms": ms,
            "missing": missing,
            "ratio": ms["sdpa"] / ms["sparsek"] if "sdpa" in ms else None,
            "state_bytes": states[0].nbytes,
            "bytes_per_second": rate,
            "share_of_copy": rate / bandwidth if bandwidth else None,
        }
        del states, calls


def _dense(shape: Shape, length: int, q, sets: int, generator) -> Callable[[], object]:
    size = (shape.batch, shape.kv_heads, length, shape.head_dim)
    # One set is far larger than the L2 cache already; the same one is read `sets` times.
    keys, values = (
        torch.randn(*size, device=shape.device, dtype=shape.dtype, generator=generator)
        for _ in range(2)
    )

    @torch.no_grad()
    def call() -> None:
        for _ in range(sets):
            F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)

    return graphed(call) if shape.device.type == "cuda" else call
