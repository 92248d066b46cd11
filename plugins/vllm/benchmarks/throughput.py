"""Measures a converted model and its dense base on vLLM, with equal memory, on one core of a CPU.

    python plugins/vllm/benchmarks/throughput.py tiny-sparsek DENSE-BASE --requests 1 16

Each model runs in a process of its own, on one thread, and what is counted is the time of that
process, which others on the machine do not change. Prompts are random tokens that share nothing.
All requests of a row come at once; where a cache has no room for them, vLLM lets some wait. Prints
a Markdown table: how many sequences fit, prompt tokens read per second, tokens written per second
by steps in which every request writes (none where some still wait), and those written per second
of the whole row, prompts included in the time.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from in_turn import all_write, in_turn, sequences, steps

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def start(model: str, args: argparse.Namespace):
    """vLLM's `LLM` in this process, with `args.memory` GiB for caches."""
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(args.memory)
    import torch
    from vllm import LLM

    torch.set_num_threads(1)
    return LLM(
        str(Path(model)) if Path(model).is_dir() else model,
        dtype=args.dtype,
        max_model_len=max(args.lengths),
        max_num_seqs=max(args.requests),
        gpu_memory_utilization=0.2,  # not of the caches: of a CPU's memory that must be free
        enable_prefix_caching=False,
        enforce_eager=True,
        distributed_executor_backend="uni",
    )


def measure(llm, *, requests: int, prompt: int, new: int) -> tuple[float, float | None, float]:
    """Tokens per second read, written by full steps (or None), and written in all."""
    reading = total = full = 0.0
    full_steps = 0
    begun = at_it = False
    sizes = {"requests": requests, "prompt": prompt, "new": new}
    for now, written in steps(llm, **sizes, clock=time.process_time):
        if at_it:
            full, full_steps = full + now - total, full_steps + 1
        if not begun:
            reading = now
        total, begun, at_it = now, all(written), all_write(written, new)
    steady = full_steps * requests / full if full_steps else None
    return requests * prompt / reading, steady, requests * new / total


def rows(model: str, args: argparse.Namespace) -> None:
    """Prints the rows of one model."""
    llm = start(model, args)
    measure(llm, requests=1, prompt=64, new=4)  # whatever is made on the first call
    for length in args.lengths:
        for requests in args.requests:
            read, steady, written = measure(
                llm, requests=requests, prompt=length - args.new, new=args.new
            )
            shown = "-" if steady is None else f"{steady:.0f}"
            print(
                f"| {Path(model).name} | {length:,} | {requests} | {sequences(llm, length):,.1f} "
                f"| {read:.0f} | {shown} | {written:.1f} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="converted and dense, folders or hub ids")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 8192])
    parser.add_argument("--new", type=int, default=64, help="tokens to write, part of each length")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--memory", type=int, default=1, help="GiB for the caches of a model")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    print(
        f"| model | tokens | requests | sequences in {args.memory} GiB | read/s | written/s, all "
        "at it | written/s in all |\n|---|---|---|---|---|---|---|",
        flush=True,
    )
    in_turn(rows, args)


if __name__ == "__main__":
    main()
