"""Times launch shapes of the attention kernels on this GPU, to choose the rows of tuning.json.

python -m sparsek_cli.benchmarks.tune [--length 32768] [--kinds forward,dq,dkdv] [--json FILE]

Compiles every candidate first, in parallel, then times each on random data (median of CUDA events)
and prints milliseconds and achieved TFLOP/s, best first; `--json` writes the same. A row of
tuning.json also names the device's capability and the heads it is for: it is written by hand.
"""

import argparse
import json
import multiprocessing
import sys

import torch
from sparsek_kernels.triton import forward as fore
from sparsek_kernels.triton import pipeline, selection
from sparsek_kernels.triton.backward.key_gradient import key_gradient
from sparsek_kernels.triton.backward.query_gradient import query_gradient
from sparsek_kernels.triton.backward.scores import interior_runs
from sparsek_kernels.triton.geometry import geometry
from sparsek_kernels.triton.lists import SUPER_TILE, key_lists
from sparsek_kernels.triton.thresholds.descent import prefix_thresholds
from sparsek_kernels.triton.tuning import Config

from sparsek_cli.errors import first_line


def candidates(kind: str) -> list[Config]:
    """Shapes worth a try; those that do not fit are reported and skipped."""
    if kind == "forward":
        shapes = [(128, 4, 32, 4, 3, 1), (128, 4, 64, 8, 3, 1), (128, 4, 64, 8, 2, 1, 128),
                  (128, 4, 32, 8, 3, 1, 128), (128, 4, 32, 8, 4, 1, 128),
                  (64, 4, 64, 4, 3, 1), (128, 4, 64, 8, 2, 1, 168), (128, 4, 32, 4, 3, 2),
                  (128, 4, 16, 4, 4, 1), (64, 4, 32, 4, 3, 1, 168), (64, 4, 64, 4, 2, 1, 168),
                  (128, 4, 128, 4, 2, 1), (128, 4, 64, 4, 2, 1)]  # fmt: skip
        return [Config(*s) for s in shapes]
    if kind == "dq":
        shapes = [(64, 4, 64, 4, 2, 1), (64, 4, 32, 4, 3, 1), (128, 4, 64, 8, 2, 1),
                  (128, 4, 64, 8, 3, 1), (128, 4, 32, 8, 4, 1), (128, 4, 32, 8, 3, 1, 128),
                  (64, 4, 32, 4, 3, 1, 168), (64, 4, 64, 4, 2, 1, 168)]  # fmt: skip
        return [Config(*s) for s in shapes]
    shapes = [(64, 1, 128, 8, 2), (64, 1, 128, 8, 3), (32, 1, 128, 8, 3), (64, 1, 64, 4, 2),
              (32, 1, 64, 4, 3), (32, 1, 64, 4, 2), (32, 1, 128, 8, 2)]  # fmt: skip
    return [Config(*s, masked_stages=m) for s in shapes for m in (1, 2)]


class Case:
    """Random inputs of one size and everything a kernel needs before it runs."""

    def __init__(self, length: int, args, device="cuda"):
        heads, groups = args.heads
        dim, dtype = args.dim, torch.bfloat16
        new = torch.Generator(device).manual_seed(0)
        draw = lambda h: torch.randn(  # noqa: E731
            args.batch, h, length, dim, device=device, dtype=dtype, generator=new
        )
        self.q, self.k, self.v, self.do = draw(heads), draw(groups), draw(groups), draw(heads)
        self.e = torch.randn(
            args.batch, groups, length, device=device, generator=new, dtype=torch.float64
        )
        topk = (min(args.topk, length),) * groups
        self.settings = pipeline.Settings(topk, args.window, 4, args.gate, dim**-0.5)
        self.shape = geometry(self.q.shape, self.k.shape, self.q.device)
        self.sinks = pipeline.sink_mask(self.shape, 4)
        self.end = selection.selection_ends(
            self.e, topk, args.window, self.shape, always=self.sinks
        )
        size = pipeline.list_size(self.settings, self.q, self.k)
        self.lists = key_lists(self.end, topk, args.window, 4, self.shape, [size, SUPER_TILE])
        self.tau = prefix_thresholds(self.e, topk, args.window, self.shape, 4)
        self.runs, _ = interior_runs(self.e, self.tau, args.window, self.shape, 4)
        self.gate_scores = pipeline.gate_values(self.e, self.sinks)
        self.args = args
        self.out = torch.randn_like(self.q)
        self.lse = torch.full(self.q.shape[:3], 12.0, device=device)
        self.delta = torch.zeros_like(self.lse)
        keys = min(args.topk + args.window, length)
        self.flops = 4 * dim * heads * args.batch * length * keys

    def run(self, kind: str, config: Config):
        s = self.settings
        soft = s.gate != "straight_through"
        common = dict(window=s.window, scale=s.scale, gate=s.gate, config=config,
                      gate_scores=self.gate_scores if soft else None)  # fmt: skip
        if kind == "forward":
            return fore.attend_forward(
                self.q, self.k, self.v, self.end, self.lists[0], self.shape,
                tau=self.tau if soft else None, **common)  # fmt: skip
        common |= dict(tau=self.tau, runs=self.runs if self.args.scores else None)
        inputs = (self.q, self.k, self.v, self.do, self.lse, self.delta, self.end)
        if kind == "dq":
            return query_gradient(*inputs, self.lists[0], self.shape, **common)
        return key_gradient(
            *inputs, self.lists[-1], self.shape, deterministic=False, **common)  # fmt: skip


def compile_one(job) -> str | None:
    kind, config, args = job
    try:
        Case(4096, args).run(kind, config)
        torch.cuda.synchronize()
    except Exception as error:  # a shape that does not fit is a result, not a failure
        return _failure(kind, config, error)
    return None


def _failure(kind: str, config: Config, error: Exception) -> str:
    return f"{kind} {config}: {type(error).__name__} {first_line(error)[:80]}"


def median_ms(call, repeats: int = 12) -> float:
    for _ in range(2):
        call()
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, stop in pairs:
        start.record()
        call()
        stop.record()
    torch.cuda.synchronize()
    return sorted(a.elapsed_time(b) for a, b in pairs)[repeats // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", default="32/8", help="query heads/KV heads")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--topk", type=int, default=1024)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--gate", default="straight_through")
    parser.add_argument("--no-scores", dest="scores", action="store_false")
    parser.add_argument("--kinds", default="forward,dq,dkdv")
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--json")
    args = parser.parse_args()
    args.heads = tuple(int(n) for n in args.heads.split("/"))
    kinds = args.kinds.split(",")
    jobs = [(kind, config, args) for kind in kinds for config in candidates(kind)]
    context = multiprocessing.get_context("spawn")
    with context.Pool(args.workers) as pool:
        failed = [f for f in pool.map(compile_one, jobs, chunksize=1) if f]
    for line in failed:
        print("skipped", line, file=sys.stderr)
    case = Case(args.length, args)
    result = []
    for kind in kinds:
        lines = []
        for config in candidates(kind):
            try:
                ms = median_ms(lambda kind=kind, config=config: case.run(kind, config))
            except Exception as error:  # what did not compile fails again, and is told again
                print("skipped", _failure(kind, config, error), file=sys.stderr)
                continue
            products = {"forward": 2, "dq": 3, "dkdv": 4}[kind]
            work = case.flops * products / 2
            lines.append((ms, work / ms / 1e9, config))
        for ms, rate, c in sorted(lines, key=lambda line: line[0]):
            print(
                f"{kind:8s} {ms:8.3f} ms {rate:6.0f} TFLOP/s  {c.rows}x{c.keys} heads {c.heads}"
                f" warps {c.warps} stages {c.stages}/{c.masked_stages} {c.registers}"
            )
            result.append(dict(kind=kind, ms=ms, tflops=rate, **vars(c)))
    unmeasured = [kind for kind in kinds if not any(row["kind"] == kind for row in result)]
    if args.json:
        with open(args.json, "w") as file:
            json.dump(result, file, indent=1)
    if unmeasured:
        sys.exit(f"no shape of {', '.join(unmeasured)} ran")


if __name__ == "__main__":
    main()
