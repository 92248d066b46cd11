"""Watches vLLM's memory while requests pass through a model, converted or dense, on a CPU.

    python plugins/vllm/benchmarks/memory.py OUT --requests 6144
    ONEDNN_PRIMITIVE_CACHE_CAPACITY=128 python plugins/vllm/benchmarks/memory.py DENSE-BASE
    LD_PRELOAD=libtcmalloc_minimal.so.4 python plugins/vllm/benchmarks/memory.py DENSE-BASE

One process, 64 requests at a time, each of another length. Prints a Markdown table: what the system
counts, and what glibc's malloc says is allocated; the rest is what malloc keeps for itself. With
another allocator the second column is empty.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import random
from collections.abc import Iterator
from pathlib import Path

AT_ONCE = 64
LENGTHS = 20, 200  # tokens of a prompt
NEW = 2, 12  # tokens to write


class MallInfo2(ctypes.Structure):
    """What glibc's malloc says of the process; only its main arena is counted."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost",
        )
    ]  # fmt: skip


def held() -> int | None:
    """Bytes that were allocated and not freed, what malloc keeps for itself left out.

    None where the C library does not say so, or another allocator took its place.
    """
    gc.collect()
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallinfo2"):
        return None
    library.mallinfo2.restype = MallInfo2
    said = library.mallinfo2()
    return (said.uordblks + said.hblkhd) or None


def resident() -> int:
    """Bytes of this process as the system counts them."""
    return os.sysconf("SC_PAGE_SIZE") * int(Path("/proc/self/statm").read_text().split()[1])


def finished(llm, requests: int) -> Iterator[int]:
    """How many requests are done, each time that one is."""
    from vllm import SamplingParams

    engine, draw = llm.llm_engine, random.Random(0)
    vocabulary = engine.vllm_config.model_config.get_vocab_size()
    sent = done = 0
    while done < requests:
        while sent - done < AT_ONCE:
            prompt = [draw.randrange(3, vocabulary) for _ in range(draw.randrange(*LENGTHS))]
            new = SamplingParams(temperature=0, max_tokens=draw.randrange(*NEW), ignore_eos=True)
            engine.add_request(str(sent), {"prompt_token_ids": prompt}, new)
            sent += 1
        for output in engine.step():
            if output.finished:
                done += 1
                yield done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="converted or dense, a folder or hub id")
    parser.add_argument("--requests", type=int, default=6144)
    parser.add_argument("--every", type=int, default=1024, help="requests between two rows")
    args = parser.parse_args()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    llm = LLM(
        args.model,
        dtype="float32",
        max_model_len=512,
        max_num_seqs=AT_ONCE,
        gpu_memory_utilization=0.2,  # not of the caches: of a CPU's memory that must be free
        enable_prefix_caching=False,
        enforce_eager=True,
        distributed_executor_backend="uni",
    )
    print("| requests | resident, MiB | allocated, MiB |\n|---|---|---|", flush=True)
    for done in finished(llm, args.requests):
        if done % args.every == 0:
            allocated = held()
            said = "" if allocated is None else f"{allocated / 2**20:,.1f}"
            print(f"| {done:,} | {resident() / 2**20:,.1f} | {said} |", flush=True)


if __name__ == "__main__":
    main()
