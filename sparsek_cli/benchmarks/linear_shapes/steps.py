"""Whole decoding steps, by tables of launch shapes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from sparsek_kernels.triton.decode import step as attention
from sparsek_kernels.triton.linears import Shape, shapes

from sparsek_cli.benchmarks import generate_shape
from sparsek_cli.models import SparseKCache
from sparsek_cli.models.generation import cuda_graphs as graphs
from sparsek_cli.models.generation.likeliest import likeliest


@torch.no_grad()
def time_steps(
    toy: bool, device, rows: int, best: dict[tuple, Shape], count: int, quick: bool
) -> None:
    """Tokens per second of the whole step, each way."""
    model = generate_shape.build(toy, device)
    prompt = torch.randint(model.config.vocab_size, (rows, 40 if toy else 4096), device=device)
    cache = SparseKCache(model.config)
    model(prompt, past_key_values=cache, logits_to_keep=1)
    base = shapes.USUAL[shapes.rows_class(rows)]
    few = attention.ONE_LAUNCH_ROWS
    # Fused or not, torch.compile's options, table and usual shape, most rows of one launch.
    ways: dict[str, tuple[bool, Any, dict | None, Shape, int]] = {
        "as it is": (False, None, None, base, few),
        "ours": (True, None, None, base, few),
        "ours, insertion and attention in two launches": (True, None, None, base, 0),
        "ours, best shapes": (True, None, best, base, few),
    }
    if device.type == "cuda":
        # Launches of what has no shape of its own overlap too, by the usual shape.
        for label, late in (("none", False), ("all", True)):
            table = {key: replace(shape, overlap=late) for key, shape in best.items()}
            usual = replace(base, overlap=late)
            ways[f"ours, best shapes, {label} overlapping"] = (True, None, table, usual, few)
        if not quick:
            ways["compile"] = (False, (), None, base, few)
    for label, (fused, compiled, table, usual, together) in ways.items():
        model.fused_steps = fused
        with _cut(rows, table, usual, together):
            try:
                print(f"  {label}: {_rate(model, cache, rows, prompt.shape[1], count, compiled)}")
            except Exception as error:
                print(f"  {label}: FAILED, {type(error).__name__}: {error}", flush=True)


@contextmanager
def _cut(rows: int, table: dict[tuple, Shape] | None, usual: Shape, few: int) -> Iterator[None]:
    """Within the block maps of so many rows are cut by a table (None: as shipped), or as usual.

    few: up to how many rows insertion and attention are one launch.
    """
    kept = dict(shapes.TUNED), set(shapes.FASTER_IN_TORCH), dict(shapes.USUAL)
    before = attention.ONE_LAUNCH_ROWS
    if table is not None:
        shapes.TUNED.clear()
        shapes.TUNED.update(table)
        shapes.FASTER_IN_TORCH.difference_update(table)
    shapes.USUAL[shapes.rows_class(rows)] = usual
    attention.ONE_LAUNCH_ROWS = few
    try:
        yield
    finally:
        attention.ONE_LAUNCH_ROWS = before
        for held, old in zip(
            (shapes.TUNED, shapes.FASTER_IN_TORCH, shapes.USUAL), kept, strict=True
        ):
            held.clear()
            held.update(old)


def _rate(model, cache, rows: int, place: int, count: int, compiled) -> str:
    decoder = graphs.Decoder(model, rows, pick=likeliest, compiled=compiled)
    own = cache if model.device.type == "cuda" else None
    places = torch.full((rows,), place, device=model.device)
    with decoder.over(cache, places):
        if own is None and model.fused_steps:  # a CPU has no graphs, which would ask for them
            decoder._fuse()
        ready = generate_shape.seconds(model.device, lambda: [decoder.step() for _ in range(2)])
        took = generate_shape.seconds(model.device, lambda: [decoder.step() for _ in range(count)])
    kept = "" if decoder.fused is None else f", {sum(decoder.fused.taken.values())} modules fused"
    rate = f"{rows * count / took:.0f} tokens/s, {1e6 * took / count:.0f} us a step"
    return f"{rate}, ready after {ready:.1f} s{kept}"
