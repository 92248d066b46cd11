"""Tokens per second of a real model, sparse and dense, after prompts of several lengths.

Dense means the same weights under full attention. On a GPU a decoding step of either is a CUDA
graph, so that short contexts measure kernels and not Python; on a CPU both run eagerly.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch

from sparsek_cli.errors import SparsekError

# Tokens that a graph must write as the model does before it is timed.
CHECKED = 4


def measure(
    model, lengths: Iterable[int], *, tokens: int, repeats: int, seed: int,
    say: Callable[[str], None],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """One row per prompt length: prefill seconds and decoding tokens per second, both ways.

    Args:
        model: a converted causal LM. tokens: how many to decode after each prompt.

    Raises:
        SparsekError: a graph's tokens are not the model's.
    """
    from sparsek_cli.models.runtime import dense_attention

    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config().vocab_size
    for length in lengths:
        prompt = torch.randint(vocabulary, (1, length), generator=generator).to(model.device)
        row: dict[str, Any] = {
            "length": length, "tokens": tokens, "cuda_graphs": prompt.is_cuda, "missing": {}
        }  # fmt: skip
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
    start = _now(prompt)
    out = model(prompt, use_cache=True, logits_to_keep=1)
    seconds = _now(prompt) - start
    word = out.logits[:, -1:].argmax(-1)
    step = Step(model, word, prompt.shape[1], out.past_key_values)
    del out
    decode = _graphed(step) if prompt.is_cuda else step
    start = _now(prompt)
    for _ in range(tokens):
        decode()
    return seconds, tokens / (_now(prompt) - start)


def _now(where: torch.Tensor) -> float:
    if where.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


class Step:
    """One step of greedy decoding in place: `word` [1, 1] becomes the next one.

    Args:
        word: the token to read first. position: its place. cache: what precedes it.
    """

    def __init__(self, model, word: torch.Tensor, position: int, cache: Any):
        self.model, self.word, self.cache = model, word.clone(), cache
        self.position = torch.full_like(word, position)

    def __call__(self) -> None:
        out = self.model(
            self.word, position_ids=self.position, past_key_values=self.cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        self.word.copy_(out.logits[:, -1:].argmax(-1))
        self.position.add_(1)


def _graphed(step: Step) -> Callable[[], None]:
    """The step as a replayed CUDA graph.

    A cache that grows is frozen at its length: every replay reads as much of it as the first, the
    least that dense attention can do.
    """
    grows = not hasattr(step.cache.layers[0], "state")
    model, word, position = step.model, step.word, int(step.position)
    eager = Step(model, word, position, copy.deepcopy(step.cache))
    expected = []
    for _ in range(1 if grows else CHECKED):
        eager()
        expected.append(int(eager.word))
    del eager
    if grows:
        freeze(step.cache)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for number, token in enumerate(expected):
        graph.replay()
        if int(step.word) != token:
            raise SparsekError(
                f"token {number} of a CUDA graph is {int(step.word)}, the model's is {token}",
                hint="please report this with the model's name",
            )
    return graph.replay


def freeze(cache: Any) -> None:
    """Turns a cache that grows into one with room for a single further token, at a fixed place."""
    for layer in cache.layers:
        layer.__class__ = _frozen(type(layer))
        for name in ("keys", "values"):
            held = getattr(layer, name)
            room = held.new_zeros(*held.shape[:-2], 1, held.shape[-1])
            setattr(layer, name, torch.cat([held, room], dim=-2))


def _frozen(growing: type) -> type:
    class Frozen(growing):
        """The last place is the next token's."""

        def update(self, key_states, value_states, *args: Any, **kwargs: Any):
            self.keys[..., -1:, :].copy_(key_states)
            self.values[..., -1:, :].copy_(value_states)
            return self.keys, self.values

        def get_seq_length(self, *args: Any) -> int:
            return self.keys.shape[-2] - 1

    return Frozen
