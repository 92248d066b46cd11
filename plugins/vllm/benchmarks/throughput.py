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
import multiprocessing
import os
import time
from pathlib import Path

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


def sequences(llm, length: int) -> float:
    """How many requests of `length` tokens the memory for caches holds."""
    config = llm.llm_engine.vllm_config
    cache = config.cache_config
    if hasattr(config.model_config.hf_config, "sparsek"):
        return float(cache.num_gpu_blocks)  # one block for each request, whatever its length
    return cache.num_gpu_blocks * cache.block_size / length


def measure(llm, *, requests: int, prompt: int, new: int) -> tuple[float, float | None, float]:
    """Tokens per second read, written by full steps (or None), and written in all."""
    import torch
    from vllm import SamplingParams

    draw = torch.Generator().manual_seed(prompt)
    vocabulary = llm.llm_engine.vllm_config.model_config.get_vocab_size()
    texts = torch.randint(5, vocabulary, (requests, prompt), generator=draw).tolist()
    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
    engine = llm.llm_engine
    for number, text in enumerate(texts):
        engine.add_request(str(number), {"prompt_token_ids": text}, params)
    written = [0] * requests
    reading = total = full = 0.0
    full_steps = 0
    while engine.has_unfinished_requests():
        begin = time.process_time()
        outputs = engine.step()
        took = time.process_time() - begin
        total += took
        all_begun, all_at_it = all(written), all(0 < done < new for done in written)
        for output in outputs:
            written[int(output.request_id)] = len(output.outputs[0].token_ids)
        if all_at_it:
            full, full_steps = full + took, full_steps + 1
        if not all_begun:
            reading = total
    if written != [new] * requests:
        raise RuntimeError("a request ended early")
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
    for model in args.models:
        process = multiprocessing.get_context("spawn").Process(target=rows, args=(model, args))
        process.start()
        process.join()


if __name__ == "__main__":
    main()
