"""Times the linear maps of a 1B model's decoding step, by many ways, and the step they make.

    python -m sparsek_cli.benchmarks.linear_shapes                 # a GPU; about eight minutes
    python -m sparsek_cli.benchmarks.linear_shapes --rows 4 --quick      # three minutes
    TRITON_INTERPRET=1 python -m sparsek_cli.benchmarks.linear_shapes --toy      # a CPU

For every map with what stands around it (norm, bias, positions, scores, gate, residual) and every
number of rows: microseconds, and bytes of weights per second, of torch's modules (cuBLAS), of
torch.compile with and without coordinate descent, and of our kernels under each launch shape, with
its registers and spilled bytes; the fastest once more with launches that overlap, and that ask the
L2 cache for weights ahead. WRONG marks a result that is not torch's. Weights lie in several copies,
so that none is found in the L2 cache. Then tokens per second of the whole step: as it is, compiled,
with our kernels as they are shipped, and with the best shapes of the table, as they are, all with
and all without launches that overlap. Last, the lines for
`sparsek_kernels/triton/linears/shapes.py`.
"""

from __future__ import annotations

import argparse
import time

import torch

from sparsek_cli.benchmarks import generate_shape
from sparsek_cli.benchmarks.linear_shapes.maps import time_map
from sparsek_cli.benchmarks.linear_shapes.steps import time_steps
from sparsek_cli.benchmarks.timing import copy_bandwidth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="1,4")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--quick", action="store_true", help="fewer shapes, no torch.compile")
    parser.add_argument("--limit", type=float, default=420.0, help="seconds; then no map starts")
    args = parser.parse_args()
    start = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() and not args.toy else "cpu")
    dtype = torch.float32 if args.toy else torch.bfloat16
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    bandwidth = copy_bandwidth(device, 1 << 31 if device.type == "cuda" else 1 << 22)
    print(f"{name}, torch {torch.__version__}, copies move {bandwidth / 1e9:.0f} GB/s")
    size = generate_shape.SHAPES[args.toy]
    tuned: dict = {}
    for rows in map(int, args.rows.split(",")):
        best = {}
        for place in ("gate and up", "down", "qkv", "out", "head"):
            if time.perf_counter() - start > args.limit:
                print("out of time")
                break
            key, shape = time_map(place, rows, size, dtype, device, args)
            if shape is not None:
                best[key] = shape
            else:
                print(f"  faster in torch: {key}")
            torch.compiler.reset()
        print(f"whole steps, {rows} rows:")
        time_steps(args.toy, device, rows, best, 4 if args.toy else 200, args.quick)
        tuned |= best
    print("TUNED = {")
    for key, shape in tuned.items():
        print(f"    {key}: {shape},")
    print("}")


if __name__ == "__main__":
    main()
