"""Times the linear maps of a 1B model's decoding step, by many ways, and the step they make.

    python -m sparsek_cli.benchmarks.linear_shapes                 # a GPU; about eight minutes
    python -m sparsek_cli.benchmarks.linear_shapes --rows 1 --quick
    TRITON_INTERPRET=1 python -m sparsek_cli.benchmarks.linear_shapes --toy      # a CPU

For every map with what stands around it (norm, bias, positions, scores, gate, residual) and every
number of rows: microseconds, and bytes of weights per second, of torch's modules (cuBLAS), of
torch.compile with and without coordinate descent, and of our kernels under each launch shape; WRONG
marks a result that is not torch's. Weights lie in several copies, so that none is found in the L2
cache. Then tokens per second of the whole step: as it is, compiled, with our kernels as they are
shipped, with the best shapes of the table, and with launches that overlap. Last, the lines for
`sparsek_kernels/triton/linears/shapes.py`.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from sparsek_kernels.triton import linears
from sparsek_kernels.triton.linears import Norm, Scorer, Shape, shapes
from torch.nn import functional as F

from sparsek_cli.benchmarks import generate_shape
from sparsek_cli.benchmarks.timing import copy_bandwidth, graphed, interleaved_ms
from sparsek_cli.models import SparseKCache
from sparsek_cli.models.generation import cuda_graphs as graphs

COLD = 192 << 20  # bytes of weights that one graph reads, beyond any L2 cache
COMPILED: dict[str, dict[str, Any]] = {
    "compile": {},
    "compile, coordinate descent": {"options": {"coordinate_descent_tuning": True}},
    "compile, max-autotune": {"mode": "max-autotune-no-cudagraphs"},
}
NEAR = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


class Place:
    """One map of the model and what stands around it, with one copy of its weights.

    Args:
        name: "qkv", "out", "gate and up", "down" or "head".
    """

    def __init__(self, name: str, rows: int, size: dict[str, int], dtype, device, seed: int):
        draw = torch.Generator(device).manual_seed(seed)

        def new(*shape: int, kind=dtype) -> torch.Tensor:
            made = torch.randn(*shape, generator=draw, device=device)
            return (made / shape[-1] ** 0.5 if len(shape) > 1 else made).to(kind)

        hidden, wide, dim = size["hidden_size"], size["intermediate_size"], size["head_dim"]
        heads, groups = size["num_attention_heads"] * dim, size["num_key_value_heads"] * dim
        columns, outputs = {
            "qkv": (hidden, (heads, groups, groups)),
            "out": (heads, (hidden,)),
            "gate and up": (hidden, (wide, wide)),
            "down": (wide, (hidden,)),
            "head": (hidden, (size["vocab_size"],)),
        }[name]
        self.name, self.dim = name, dim
        self.x = 4 * new(rows, columns)
        self.maps = tuple((new(count, columns), None) for count in outputs)
        self.norm = Norm(1 + new(columns), 1e-5)
        self.residual = new(rows, outputs[0])
        angle = torch.rand(rows, dim // 2, generator=draw, device=device).repeat(1, 2)
        self.turn = angle.cos().to(dtype), angle.sin().to(dtype)
        count = groups // dim
        self.scorer = Scorer(*(new(*s, kind=torch.float32) for s in ((count, columns), (count,))))
        self.key = (rows > 1, columns, sum(outputs))

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for weight, _ in self.maps)

    def own(self, shape: Shape | None) -> tuple[torch.Tensor, ...]:
        """By our kernels, in one launch."""
        weight = self.maps[0][0]
        if self.name == "qkv":
            given = {"norm": self.norm, "turn": self.turn, "scorer": self.scorer, "shape": shape}
            return linears.project(self.x, self.maps, self.dim, **given)
        if self.name == "gate and up":
            return (linears.gated(self.x, *self.maps, norm=self.norm, shape=shape),)
        residual = None if self.name == "head" else self.residual
        return (linears.linear(self.x, weight, residual=residual, shape=shape),)

    def torch(self) -> tuple[torch.Tensor, ...]:
        """By torch's functions, as a model's modules call them."""
        weight = self.maps[0][0]
        if self.name == "head":
            return (F.linear(self.x, weight),)
        if self.name in ("out", "down"):
            return (self.residual + F.linear(self.x, weight),)
        wide = self.x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.norm.eps)
        x = self.norm.weight * wide.to(self.x.dtype)
        if self.name == "gate and up":
            gate, up = (F.linear(x, weight) for weight, _ in self.maps)
            return (F.silu(gate) * up,)
        q, k, v = (F.linear(x, weight).unflatten(1, (-1, self.dim)) for weight, _ in self.maps)
        scores = F.linear(x.float(), self.scorer.weight, self.scorer.bias)
        return self._turned(q), self._turned(k), v, scores

    def _turned(self, x: torch.Tensor) -> torch.Tensor:
        low, high = x.chunk(2, dim=-1)
        cos, sin = (part[:, None] for part in self.turn)
        return x * cos + torch.cat((-high, low), dim=-1) * sin


def variants(rows: int, place: Place, quick: bool, toy: bool) -> Iterator[Shape]:
    """Launch shapes to try for a map."""
    columns = place.x.shape[1]
    if toy:
        yield from (Shape(4, 32, 4),) if rows == 1 else ()
        yield Shape(16, 16, 4, 2, dot=True)
        return
    if rows == 1:
        wide = [size for size in (512, 1024, 2048, 4096, 8192) if size <= columns]
        for pairs, step, warps in itertools.product((1, 2, 4, 8), wide, (2, 4, 8)):
            each = pairs * 2 * step // (32 * warps)  # weights a thread holds
            if 16 <= each <= (64 if quick else 128):
                yield Shape(pairs, step, warps)
    steps = (256,) if quick else (128, 256, 512)
    for pairs, step, warps, stages in itertools.product((8, 16, 32), steps, (2, 4), (3, 5)):
        if 2 * pairs * step * 2 * stages <= 200 << 10 and pairs >= 8:
            yield Shape(pairs, step, warps, stages, dot=True)


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
    """Prints a map's table; its key and fastest shape of ours."""
    first = Place(name, rows, size, dtype, device, 0)
    copies = 1 if device.type != "cuda" else max(2, min(64, -(-COLD // first.nbytes)))
    places = [first, *(Place(name, rows, size, dtype, device, i) for i in range(1, copies))]
    own = {f"ours {text(shape)}": shape for shape in variants(rows, first, args.quick, args.toy)}
    calls: dict[str, Callable] = {"torch": Place.torch}
    for label, options in COMPILED.items():
        given = {"backend": "aot_eager"} if args.toy else options
        if not (args.quick and "max" in label):
            calls[label] = torch.compile(Place.torch, dynamic=False, **given)
    calls |= {label: lambda place, shape=shape: place.own(shape) for label, shape in own.items()}
    times = measured(places, calls, 1 if args.toy else 5)
    mine = sorted((us, label) for label, us in times.items() if label in own)
    best = own[mine[0][1]] if mine else None
    if best is not None and device.type == "cuda":
        overlapping = {
            f"ours {text(shape)}": shape
            for shape in (replace(own[label], overlap=True) for _, label in mine[:3])
        }
        own |= overlapping
        calls = {f: lambda place, shape=s: place.own(shape) for f, s in overlapping.items()}
        times |= measured(places, calls, 5)
    expected = first.torch()
    print(f"{name}, {rows} rows, {first.nbytes / 2**20:.1f} MiB of weights, {copies} copies")
    for label, us in sorted(times.items(), key=lambda item: item[1]):
        wrong = label in own and not _equal(first.own(own[label]), expected)
        rate = first.nbytes / us / 1e3
        print(f"  {us:9.2f} us {rate:7.0f} GB/s  {label}{'  WRONG' if wrong else ''}", flush=True)
    return first.key, best


def _equal(found: tuple, expected: tuple) -> bool:
    return all(
        float((a.float() - b.float()).norm() / b.float().norm()) < NEAR[b.dtype]
        or (b.dtype == torch.float32 and torch.allclose(a, b, atol=5e-2))  # scores of bf16 rows
        for a, b in zip(found, expected, strict=True)
    )


def text(shape: Shape) -> str:
    kind = f"dot {shape.stages} stages" if shape.dot else "row"
    late = ", overlapping" if shape.overlap else ""
    return f"{kind}, {shape.pairs} pairs x {shape.columns}, {shape.warps} warps{late}"


@torch.no_grad()
def time_steps(toy: bool, device, rows: int, best: dict[tuple, Shape], count: int) -> None:
    """Tokens per second of the whole step, each way."""
    model = generate_shape.build(toy, device)
    prompt = torch.randint(model.config.vocab_size, (rows, 40 if toy else 4096), device=device)
    cache = SparseKCache(model.config)
    model(prompt, past_key_values=cache, logits_to_keep=1)
    few = rows > 1
    base = shapes.FEW_ROWS if few else shapes.ONE_ROW
    shipped = dict(shapes.TUNED)
    overlapping = {key: replace(shape, overlap=True) for key, shape in best.items()}
    ways: dict[str, tuple[bool, Any, dict, Shape]] = {
        "as it is": (False, None, {}, base),
        "ours": (True, None, shipped, base),
        "ours, best shapes": (True, None, best, base),
    }
    if device.type == "cuda":
        # Launches of what has no shape of its own overlap too, by the usual shape.
        late = replace(base, overlap=True)
        ways |= {
            "ours, best shapes, overlapping": (True, None, overlapping, late),
            "compile": (False, (), {}, base),
        }
    for label, (fused, compiled, table, usual) in ways.items():
        model.fused_steps = fused
        shapes.TUNED.clear()
        shapes.TUNED.update(table)
        setattr(shapes, "FEW_ROWS" if few else "ONE_ROW", usual)
        try:
            print(f"  {label}: {_rate(model, cache, rows, prompt.shape[1], count, compiled)}")
        except Exception as error:
            print(f"  {label}: FAILED, {type(error).__name__}: {error}", flush=True)
        finally:
            shapes.TUNED.clear()
            shapes.TUNED.update(shipped)
            setattr(shapes, "FEW_ROWS" if few else "ONE_ROW", base)


def _rate(model, cache, rows: int, place: int, count: int, compiled) -> str:
    decoder = graphs.Decoder(model, rows, pick=lambda logits: logits.argmax(-1), compiled=compiled)
    own = cache if model.device.type == "cuda" else None
    places = torch.full((rows,), place, device=model.device)
    with decoder.over(cache, places):
        if own is None and model.fused_steps:  # a CPU has no graphs, which would ask for them
            decoder._fuse()
        ready = generate_shape.seconds(model.device, lambda: [decoder.step() for _ in range(2)])
        took = generate_shape.seconds(model.device, lambda: [decoder.step() for _ in range(count)])
    kept = "" if decoder.fused is None else f", {sum(decoder.fused.taken.values())} modules fused"
    return f"{rows * count / took:.0f} tokens/s, ready after {ready:.1f} s{kept}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="1,4")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--quick", action="store_true", help="fewer shapes, no max-autotune")
    parser.add_argument("--limit", type=float, default=420.0, help="seconds; then no map starts")
    args = parser.parse_args()
    start = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() and not args.toy else "cpu")
    dtype = torch.float32 if args.toy else torch.bfloat16
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    bandwidth = copy_bandwidth(device, 1 << 31 if device.type == "cuda" else 1 << 22)
    print(f"{name}, torch {torch.__version__}, copies move {bandwidth / 1e9:.0f} GB/s")
    size = generate_shape.SHAPES[args.toy]
    tuned: dict[tuple, Shape] = {}
    for rows in map(int, args.rows.split(",")):
        best = {}
        for place in ("gate and up", "down", "qkv", "out", "head"):
            if time.perf_counter() - start > args.limit:
                print("out of time")
                break
            key, shape = time_map(place, rows, size, dtype, device, args)
            if shape is not None:
                best[key] = shape
            torch.compiler.reset()
        print(f"whole steps, {rows} rows:")
        time_steps(args.toy, device, rows, best, 4 if args.toy else 200)
        tuned |= best
    print("TUNED = {")
    for key, shape in tuned.items():
        print(f"    {key}: {shape},")
    print("}")


if __name__ == "__main__":
    main()
