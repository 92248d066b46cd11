"""Measures a converted model and its dense base on vLLM and one GPU, with equal memory for caches.

    python plugins/vllm/benchmarks/random_model.py FOLDER
    python plugins/vllm/benchmarks/gpu.py FOLDER/sparsek FOLDER/dense --rows 8192:1,8,32,64 32768:16

Each model runs in a process of its own. Prompts are random tokens that share nothing; all requests
of a row come at once, and where a cache has no room for them, vLLM lets some wait. For each row:
how many sequences fit, prompt tokens read per second, milliseconds of a step in which every request
writes (none where some still wait), tokens written per second by such steps, and those written per
second of the whole row. Replays of CUDA graphs are counted: a step that decodes through one full
graph replays once, one in pieces once more than the model has layers. Results go to standard output
as a Markdown table, and to `--out` as JSON lines.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import traceback
from pathlib import Path
from typing import Any

from in_turn import all_write, in_turn, sequences, steps

os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the graphs are counted in this process
HEADER = (
    "| model | tokens | requests | fit | read/s | step, ms | written/s, all at it "
    "| written/s in all | replays of a step |\n|---|---|---|---|---|---|---|---|---|"
)


class Replays:
    """Counts the CUDA graphs that are replayed in this process."""

    def __init__(self) -> None:
        import torch

        self.count = 0
        replay = torch.cuda.CUDAGraph.replay

        def counted(graph):
            self.count += 1
            return replay(graph)

        torch.cuda.CUDAGraph.replay = counted


def start(model: str, longest: int, most: int, args: argparse.Namespace) -> Any:
    """vLLM's `LLM` in this process."""
    from vllm import LLM

    sizes = sorted({1, most, *(n for n in (2, 4, 8, 16, 32, 64, 128, 256) if n < most)})
    options = {"enforce_eager": True} if args.eager else {}
    if not args.eager:
        options["compilation_config"] = {"cudagraph_capture_sizes": sizes}
    if args.memory:
        # Then the share of the GPU is only looked at: whether so much is free beside others.
        options |= {
            "kv_cache_memory_bytes": int(args.memory * 2**30), "gpu_memory_utilization": 0.1,
        }  # fmt: skip
    return LLM(
        model,
        dtype=args.dtype,
        max_model_len=longest,
        max_num_seqs=most,
        max_num_batched_tokens=args.batched,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        distributed_executor_backend="uni",
        disable_log_stats=True,
        seed=0,
        **options,
    )


def measure(llm: Any, replays: Replays | None, requests: int, prompt: int, new: int) -> dict:
    """One row; see this file's first lines."""
    reading = total = None
    steady: list[tuple[float, int, int]] = []  # seconds, tokens and replays until then
    sizes = {"requests": requests, "prompt": prompt, "new": new}
    for total, written in steps(llm, **sizes, clock=time.perf_counter):
        if all(written) and reading is None:
            reading = total
        if all_write(written, new):
            steady.append((total, sum(written), replays.count if replays else 0))
    row = {
        "tokens": prompt + new, "requests": requests, "fit": sequences(llm, prompt + new),
        "read_per_second": requests * prompt / reading, "read_seconds": reading,
        "written_in_all": requests * new / total, "seconds": total,
        "step_ms": None, "written_at_it": None, "replays_of_a_step": None,
    }  # fmt: skip
    steady = steady[2:]  # whatever overlaps with the last prompt
    if len(steady) > 8:
        took, wrote = steady[-1][0] - steady[0][0], steady[-1][1] - steady[0][1]
        row["written_at_it"] = wrote / took
        row["step_ms"] = 1e3 * took / (wrote / requests)
        row["replays_of_a_step"] = (steady[-1][2] - steady[0][2]) / (len(steady) - 1)
    return row


def show(name: str, row: dict) -> str:
    def number(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:,.{digits}f}"

    return (
        f"| {name} | {row['tokens']:,} | {row['requests']} | {row['fit']:,.1f} "
        f"| {row['read_per_second']:,.0f} | {number(row['step_ms'], 3)} "
        f"| {number(row['written_at_it'], 0)} | {row['written_in_all']:,.1f} "
        f"| {number(row['replays_of_a_step'], 2)} |"
    )


def rows(model: str, args: argparse.Namespace) -> None:
    """Prints the rows of one model."""
    import torch

    replays = Replays() if torch.cuda.is_available() else None
    name = Path(model).name
    begin = time.perf_counter()
    longest = max(length for length, _ in args.rows)
    llm = start(model, longest, max(max(requests) for _, requests in args.rows), args)
    config = llm.llm_engine.vllm_config
    print(
        f"# {name}: started in {time.perf_counter() - begin:.0f} s, "
        f"{config.cache_config.num_gpu_blocks} blocks, "
        f"graphs {config.compilation_config.cudagraph_mode}",
        flush=True,
    )
    measure(
        llm, replays, 2, min(args.batched, longest - 4), 4
    )  # whatever is made on the first call
    deadline = time.perf_counter() + args.seconds
    for length, batches in args.rows:
        for requests in batches:
            if time.perf_counter() > deadline:
                print(f"# {name}: no time for {requests} of {length}", flush=True)
                continue
            try:
                row = measure(llm, replays, requests, length - args.new, args.new)
            except Exception:
                traceback.print_exc()
                continue
            print(show(name, row), flush=True)
            if args.out:
                with args.out.open("a") as out:
                    out.write(json.dumps({"model": name, "memory": args.memory, **row}) + "\n")


def lengths_and_requests(text: str) -> tuple[int, list[int]]:
    """`8192:1,8` -> (8192, [1, 8])."""
    length, _, requests = text.partition(":")
    return int(length), [int(number) for number in requests.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="folders, converted and dense")
    parser.add_argument("--rows", type=lengths_and_requests, nargs="+", required=True)
    parser.add_argument("--new", type=int, default=256, help="tokens to write, part of each length")
    parser.add_argument("--memory", type=float, default=16, help="GiB of caches; 0: vLLM's own")
    parser.add_argument("--batched", type=int, default=8192, help="tokens of a step")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--eager", action="store_true", help="no graphs, nothing compiled")
    parser.add_argument("--seconds", type=float, default=600, help="start no row of a model later")
    parser.add_argument("--out", type=Path, help="JSON lines")
    args = parser.parse_args()
    print(HEADER, flush=True)
    in_turn(rows, args)


if __name__ == "__main__":
    main()
