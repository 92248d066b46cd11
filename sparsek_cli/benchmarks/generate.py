"""What generating costs with a real model, sparse and dense, after prompts of several lengths.

Sparse is `model.generate` itself. Dense means the same weights under full attention; its step is a
CUDA graph too, over a cache frozen at its length, the least that dense attention can do: once with
torch's sdpa, once with an attention that splits the keys among programs (FlexAttention's kernel for
decoding). On a CPU all run eagerly. Beside each figure stands what the bytes allow: a step reads
the weights and the cache once.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch

from sparsek_cli.benchmarks.timing import copy_bandwidth
from sparsek_cli.errors import SparsekError
from sparsek_cli.models.attention.registration import replaced_attention
from sparsek_cli.models.attention.sparsek import check_cache
from sparsek_cli.models.config import DENSE_ATTENTION

# Relative difference between the logits of a step by two kernels, in bfloat16, that is rounding.
SAME_LOGITS = 0.05


def measure(
    model, lengths: Iterable[int], *, batch: int, tokens: int, repeats: int, seed: int,
    say: Callable[[str], None],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """One row per prompt length, for `batch` prompts of it, both ways.

    Args:
        model: a converted causal LM. tokens: how many to write after each prompt; at least 2.

    Yields:
        For `sparsek` and `dense`: `_first_s` (seconds to the first token), `_peak_bytes` (beyond
        the weights, while reading; None on a CPU), `_cache_bytes`, `_tokens_per_s` (of all rows
        together) and `_allowed_per_s` (the same, as the bytes allow); `split_tokens_per_s` of
        dense with split keys; `missing` says why one has none. `ratio` and `split_ratio` of the
        rates.

    Raises:
        SparsekError: a dense graph's token is not the model's.
    """
    from sparsek_cli.models import dense_attention, proven

    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config().vocab_size
    on_gpu = model.device.type == "cuda"
    bandwidth = copy_bandwidth(model.device, 1 << 31 if on_gpu else 1 << 26)
    ways = {
        "sparsek": (nullcontext, _sparse_rate),
        "dense": (lambda: dense_attention(model), _dense_rate),
    }
    for length in lengths:
        prompt = torch.randint(vocabulary, (batch, length), generator=generator).to(model.device)
        row: dict[str, Any] = {
            "length": length, "batch": batch, "tokens": tokens, "cuda_graphs": on_gpu,
            "missing": {},
        }  # fmt: skip
        for name, (context, rate) in ways.items():
            try:
                sparse = name == "sparsek"
                with context(), torch.no_grad(), proven(model, f"bench: {name}", sparse=sparse):
                    runs = [_run(model, prompt, tokens, rate) for _ in range(repeats + 1)][1:]
                if not sparse:
                    _take_split(row, runs, say)
            except torch.OutOfMemoryError:
                row["missing"][name] = "out of memory"
                say(f"{name} at {length}: out of memory")
                continue
            for key in runs[0]:
                row[f"{name}_{key}"] = sorted(run[key] for run in runs)[len(runs) // 2]
            read = weight_bytes(model) + row[f"{name}_cache_bytes"]
            row[f"{name}_allowed_per_s"] = batch * bandwidth / read
            row[f"{name}_peak_bytes"] = row[f"{name}_peak_bytes"] if on_gpu else None
        for name, key in (("dense", "ratio"), ("split", "split_ratio")):
            if not {"sparsek", name} & row["missing"].keys():
                row[key] = row["sparsek_tokens_per_s"] / row[f"{name}_tokens_per_s"]
        yield row


def _take_split(row: dict[str, Any], runs: list[dict[str, Any]], say: Callable) -> None:
    """Puts the rate with split keys, or why there is none, from the runs into the row."""
    rates = [run.pop("split_tokens_per_s") for run in runs]
    if isinstance(rates[-1], str):
        row["missing"]["split"] = rates[-1]
        say(f"dense with split keys at {row['length']}: {rates[-1]}")
    else:
        row["split_tokens_per_s"] = sorted(rates)[len(rates) // 2]


def weight_bytes(model) -> int:
    """Bytes of weights that a decoding step reads: all, but of an untied embedding a few rows."""
    held = {id(weight): weight.nbytes for weight in model.parameters()}
    table = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    if head is None or head.weight is not table:
        held.pop(id(table), None)
    return sum(held.values())


def _run(model, prompt: torch.Tensor, tokens: int, rate: Callable) -> dict[str, float]:
    before = _reset_peak(prompt)
    start = _now(prompt)
    out = model(prompt, use_cache=True, logits_to_keep=1)
    word = out.logits[:, -1:].argmax(-1)
    word.tolist()
    seconds = _now(prompt) - start
    peak = torch.cuda.max_memory_allocated() - before if prompt.is_cuda else 0
    cache = out.past_key_values
    check_cache(cache, model.config._attn_implementation)
    del out
    size = getattr(cache, "nbytes", None)
    if size is None:
        size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return {
        "first_s": seconds, "peak_bytes": peak, "cache_bytes": size,
        **rate(model, prompt, word, cache, tokens),
    }  # fmt: skip


def _reset_peak(where: torch.Tensor) -> int:
    if not where.is_cuda:
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _now(where: torch.Tensor) -> float:
    if where.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def _sparse_rate(model, prompt, word, cache, tokens: int) -> dict[str, Any]:
    """Tokens per second of `generate`, which goes on after the prompt and its first token."""
    text = torch.cat([prompt, word], dim=1)
    options = {"do_sample": False, "eos_token_id": None, "past_key_values": cache}
    start = _now(prompt)
    model.generate(text, max_new_tokens=tokens, **options)
    return {"tokens_per_s": prompt.shape[0] * tokens / (_now(prompt) - start)}


def _dense_rate(model, prompt, word, cache, tokens: int) -> dict[str, Any]:
    """Tokens per second with sdpa, and with split keys (a reason where that does not run)."""
    step = Step(model, word, prompt.shape[1], cache)
    kept = cache if prompt.is_cuda else copy.deepcopy(cache)
    decode = _graphed(step) if prompt.is_cuda else step
    expected = _first_logits(model, word, prompt.shape[1], kept)
    rates: dict[str, Any] = {"tokens_per_s": _rate(decode, prompt, tokens)}
    # Frozen, the cache holds the same prompt still, and has the same place for the next token.
    other = Step(model, word, prompt.shape[1], kept)
    try:
        with replaced_attention(DENSE_ATTENTION, lambda _: split_keys(prompt.is_cuda)):
            decode = _captured(other) if prompt.is_cuda else other
            decode()
            _check_logits(other.logits, expected)
            rates["split_tokens_per_s"] = _rate(decode, prompt, tokens)
    except Exception as error:  # whatever its compiler says: the rest of the table stands
        lines = str(error).splitlines() or [""]
        rates["split_tokens_per_s"] = f"{type(error).__name__}: {lines[0]}"
    return rates


def _first_logits(model, word: torch.Tensor, position: int, cache: Any) -> torch.Tensor:
    """What `word` leads to, [B, vocabulary], from a copy of the cache unless that is frozen."""
    frozen = all(type(layer).__name__ == "Frozen" for layer in cache.layers)
    step = Step(model, word, position, cache if frozen else copy.deepcopy(cache))
    step()
    return step.logits.clone()


def _check_logits(found: torch.Tensor, expected: torch.Tensor) -> None:
    """That two kernels computed one step: of likely tokens that are as good as equal, as those of
    random weights in bfloat16 are, either may come first."""
    found, expected = found.double(), expected.double()
    error = ((found - expected).norm() / expected.norm()).item()
    if not error < SAME_LOGITS:
        raise SparsekError(f"logits {error:.1%} from sdpa's", hint="please report this")


def _rate(decode: Callable[[], None], prompt: torch.Tensor, tokens: int) -> float:
    start = _now(prompt)
    for _ in range(tokens):
        decode()
    return prompt.shape[0] * tokens / (_now(prompt) - start)


def split_keys(compiled: bool) -> Callable:
    """An attention function for one query per row over all keys: FlexAttention, whose kernel for
    few queries shares the keys out among programs."""
    from torch.nn.attention.flex_attention import flex_attention

    attend = flex_attention
    if compiled:
        torch.compiler.reset()  # for this length alone: Dynamo gives up after eight compilations
        attend = torch.compile(flex_attention, dynamic=False)

    def forward(module, query, key, value, attention_mask, scaling=None, **kwargs):
        more = kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None
        if query.shape[2] != 1 or attention_mask is not None or more:
            raise SparsekError("not a plain step of whole rows", hint="leave this rival out")
        grouped = query.shape[1] != key.shape[1]
        out = attend(query, key, value, scale=scaling, enable_gqa=grouped)
        return out.transpose(1, 2).contiguous(), None

    return forward


class Step:
    """One step of greedy decoding in place: `word` [B, 1] becomes the next one, the likeliest of
    `logits` [B, vocabulary].

    Args:
        word: the tokens to read first. position: their place. cache: what precedes them.
    """

    def __init__(self, model, word: torch.Tensor, position: int, cache: Any):
        self.model, self.word, self.cache = model, word.clone(), cache
        self.position = torch.full_like(word, position)

    def __call__(self) -> None:
        out = self.model(
            self.word, position_ids=self.position, past_key_values=self.cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        self.logits = out.logits[:, -1]
        self.word.copy_(self.logits.argmax(-1, keepdim=True))
        self.position.add_(1)


def _graphed(step: Step) -> Callable[[], None]:
    """The step as a replayed CUDA graph over a growing cache that is frozen at its length.

    Every replay reads as much of it as the first, the least that dense attention can do.
    """
    eager = Step(step.model, step.word, int(step.position[0, 0]), copy.deepcopy(step.cache))
    eager()
    expected = eager.word.tolist()
    del eager
    freeze(step.cache)
    graph = _captured(step)
    graph()
    if step.word.tolist() != expected:
        raise SparsekError(
            f"a CUDA graph writes {step.word.tolist()}, the model {expected}",
            hint="please report this with the model's name",
        )
    return graph


def _captured(step: Step) -> Callable[[], None]:
    """The step as a CUDA graph; run once before, so that everything is compiled, and taken back."""
    word, position = step.word.clone(), step.position.clone()
    step()
    step.word.copy_(word)
    step.position.copy_(position)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
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
