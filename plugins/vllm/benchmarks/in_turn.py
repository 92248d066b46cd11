"""Models measured in turn, each in a process of its own: `throughput.py` and `gpu.py` share it."""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable, Iterator
from typing import Any


def in_turn(rows: Callable[[str, argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Calls `rows` for each of `args.models`, in processes that end before the next one starts.

    Raises:
        SystemExit: one of them failed; the others were measured.
    """
    failed = []
    for model in args.models:
        process = multiprocessing.get_context("spawn").Process(target=rows, args=(model, args))
        process.start()
        process.join()
        if process.exitcode:
            failed.append(model)
    if failed:
        raise SystemExit(f"error: no rows of {', '.join(failed)}")


def sequences(llm: Any, length: int) -> float:
    """How many requests of `length` tokens the memory for caches holds."""
    config = llm.llm_engine.vllm_config
    blocks = config.cache_config.num_gpu_blocks - 1  # without vLLM's null block
    if hasattr(config.model_config.hf_config, "sparsek"):
        return float(blocks)  # a block for each request, whatever its length
    return blocks * config.cache_config.block_size / length


def steps(
    llm: Any, *, requests: int, prompt: int, new: int, clock: Callable[[], float]
) -> Iterator[tuple[float, list[int]]]:
    """Steps until `requests` of `prompt` random tokens, sent at once, have written `new` each.

    Yields:
        seconds of `clock` since they were sent, and tokens that each request has written.

    Raises:
        RuntimeError: a request ended early.
    """
    import torch
    from vllm import SamplingParams

    engine = llm.llm_engine
    draw = torch.Generator().manual_seed(prompt + requests)
    vocabulary = engine.vllm_config.model_config.get_vocab_size()
    texts = torch.randint(5, vocabulary, (requests, prompt), generator=draw).tolist()
    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    for number, text in enumerate(texts):
        engine.add_request(str(number), {"prompt_token_ids": text}, params)
    written = [0] * requests
    begin = clock()
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now = clock() - begin
        for output in outputs:
            written[int(output.request_id)] = len(output.outputs[0].token_ids)
        yield now, list(written)
    if written != [new] * requests:
        raise RuntimeError("a request ended early")


def all_write(written: list[int], new: int) -> bool:
    """Whether every request has begun to write, and none has ended."""
    return all(0 < done < new for done in written)
