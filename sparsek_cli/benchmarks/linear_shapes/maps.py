"""The table of a map: microseconds of every way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sparsek_kernels.triton.linears import Shape, kernel

from sparsek_cli.benchmarks.linear_shapes.place import Place
from sparsek_cli.benchmarks.linear_shapes.variants import overlapping, text, variants
from sparsek_cli.benchmarks.timing import graphed, interleaved_ms

COLD = 192 << 20  # bytes of weights that one graph reads, beyond any L2 cache
COMPILED: dict[str, dict[str, Any]] = {
    "compile": {},
    "compile, coordinate descent": {"options": {"coordinate_descent_tuning": True}},
    "compile, max-autotune": {"mode": "max-autotune-no-cudagraphs"},
}
NEAR = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def measured(places: list[Place], calls: dict[str, Callable], repeats: int) -> dict[str, float]:
    """Microseconds of one call of each way, over all copies of the weights in turn."""
    device = places[0].x.device
    ready: dict[str, Callable] = {}
    for name, call in calls.items():

        def run(call=call) -> None:
            for place in places:
                call(place)

        try:
            ready[name] = graphed(run) if device.type == "cuda" else run
            if device.type != "cuda":
                run()
        except Exception as error:  # a shape may not fit the device: the others go on
            print(f"    {name}: {type(error).__name__}: {str(error).splitlines()[:1]}", flush=True)
    times = interleaved_ms(ready, device, repeats)
    return {name: 1e3 * ms / len(places) for name, ms in times.items()}


@torch.no_grad()
def time_map(name: str, rows: int, size: dict, dtype, device, args) -> tuple[tuple, Shape | None]:
    """Prints a map's table; its key and fastest shape of ours, None where torch is faster."""
    first = Place(name, rows, size, dtype, device, 0)
    copies = 1 if device.type != "cuda" else max(2, min(64, -(-COLD // first.nbytes)))
    places = [first, *(Place(name, rows, size, dtype, device, i) for i in range(1, copies))]
    own = {f"ours {text(shape)}": shape for shape in variants(rows, first, args.quick, args.toy)}
    calls: dict[str, Callable] = {"torch": Place.torch}
    for label, options in {} if args.quick else COMPILED.items():
        given = {"backend": "aot_eager"} if args.toy else options
        calls[label] = torch.compile(Place.torch, dynamic=False, **given)
    calls |= _owners(own)
    repeats = 1 if args.toy else 5
    times = measured(places, calls, repeats)
    if device.type == "cuda":
        fastest = sorted((label for label in times if label in own), key=times.get)[:2]
        late = [s for label in fastest for s in overlapping(own[label], first.x.shape[1])]
        more = {f"ours {text(shape)}": shape for shape in late}
        own |= more
        times |= measured(places, _owners(more), repeats)
    expected = first.torch()
    print(f"{name}, {rows} rows, {first.nbytes / 2**20:.1f} MiB of weights, {copies} copies")
    best = None
    for label, us in sorted(times.items(), key=lambda item: item[1]):
        note = ""
        if label in own:
            right, note = _checked(lambda s=own[label]: first.own(s), expected)
            note += "" if right else "  WRONG"
            best = own[label] if right and best is None else best
        rate = first.nbytes / us / 1e3
        print(f"  {us:9.2f} us {rate:7.0f} GB/s  {label}{note}", flush=True)
    ours = [us for label, us in times.items() if label in own]
    left = name not in ("qkv", "gate and up") and ours and times["torch"] < min(ours)
    return first.key, None if left else best


def _owners(shapes_of: dict[str, Shape]) -> dict[str, Callable]:
    return {label: lambda place, s=shape: place.own(s) for label, shape in shapes_of.items()}


def _checked(call: Callable[[], tuple], expected: tuple) -> tuple[bool, str]:
    """Whether a call of ours gives what is expected; registers and spills of its kernel."""
    if not expected[0].is_cuda:
        return _equal(call(), expected), ""
    made: list[Any] = []
    run = kernel.linears.run
    kernel.linears.run = lambda *args, **options: made.append(run(*args, **options))
    try:
        right = _equal(call(), expected)
    finally:
        del kernel.linears.run
    return right, f", {made[-1].n_regs} registers, {made[-1].n_spills} spilled"


def _equal(found: tuple, expected: tuple) -> bool:
    return all(
        float((a.float() - b.float()).norm() / b.float().norm()) < NEAR[b.dtype]
        or (b.dtype == torch.float32 and torch.allclose(a, b, atol=5e-2))  # scores of bf16 rows
        for a, b in zip(found, expected, strict=True)
    )
