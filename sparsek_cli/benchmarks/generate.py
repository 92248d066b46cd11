"""Tokens per second of a real model, sparse and dense, after prompts of several lengths.

Dense means the same weights under full attention with the cache that grows. Both run eagerly
through transformers: no CUDA graphs, so short contexts measure Python, not kernels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch


def measure(
    model, lengths: Iterable[int], *, tokens: int, repeats: int, seed: int,
    say: Callable[[str], None],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """One row per prompt length: prefill seconds and decoding tokens per second, both ways.

    Args:
        model: a converted causal LM. tokens: how many to decode after each prompt.
    """
    from sparsek_cli.models.runtime import dense_attention

    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config().vocab_size
    for length in lengths:
        prompt = torch.randint(vocabulary, (1, length), generator=generator).to(model.device)
        row: dict[str, Any] = {"length": length, "tokens": tokens, "missing": {}}
        for name, context in (("sparsek", nullcontext), ("dense", lambda: dense_attention(model))):
            try:
                with context():
                    runs = [_run(model, prompt, tokens) for _ in range(repeats + 1)][1:]
            except torch.OutOfMemoryError:
                row["missing"][name] = "out of memory"
                say(f"{name} at {length}: out of memory")
                continue
            row[f"{name}_prefill_s"] = sorted(r[0] for r in runs)[len(runs) // 2]
            row[f"{name}_tokens_per_s"] = sorted(r[1] for r in runs)[len(runs) // 2]
        if not row["missing"]:
            row["ratio"] = row["sparsek_tokens_per_s"] / row["dense_tokens_per_s"]
        yield row


@torch.no_grad()
def _run(model, prompt: torch.Tensor, tokens: int) -> tuple[float, float]:
    """Seconds to read the prompt, then tokens per second of greedy decoding."""

    def now() -> float:
        if prompt.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    start = now()
    out = model(prompt, use_cache=True, logits_to_keep=1)
    prefilled = now()
    for _ in range(tokens):
        word = out.logits[:, -1:].argmax(-1)
        out = model(word, past_key_values=out.past_key_values, use_cache=True)
    return prefilled - start, tokens / (now() - prefilled)
