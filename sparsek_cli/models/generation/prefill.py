"""Reading in chunks: what a causal LM does with more tokens than it should hold activations for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers.generation import GenerationMixin

from sparsek_cli.models.cache.slots import SparseKCache
from sparsek_cli.models.config import ATTENTION

# Tokens of all rows together that are read at once. Activations of a 1B model take 64 KB a token:
# this keeps them below 1 GiB, and is large enough that launching does not cost much of the time.
READ_CHUNK = 15 * 1024
_ALONG_TOKENS = ("input_ids", "inputs_embeds", "position_ids", "token_type_ids")


def reads_in_chunks(forward: Callable) -> Callable:
    """A causal LM's `forward` that reads long inputs piece by piece into its cache.

    Only where nobody can tell the difference: without gradients, with a SparseK cache, and when
    logits are wanted of the last tokens alone (`logits_to_keep`, which `generate` sets). The state
    after the pieces is the state after one pass.
    """

    @functools.wraps(forward)
    def in_chunks(self, *args: Any, **kwargs: Any):
        if args:
            kwargs.update(zip(_positional(forward), args, strict=False))
        size = _chunk(self, kwargs)
        if size is None:
            return forward(self, **kwargs)
        tokens = _tokens(kwargs)
        length, kept = tokens.shape[1], kwargs["logits_to_keep"]
        if kwargs.get("past_key_values") is None:
            kwargs["past_key_values"] = SparseKCache(self.config)
        seen = kwargs["past_key_values"].get_seq_length()
        starts = [*range(0, length, size)]
        starts[-1] = min(starts[-1], length - kept)  # it holds all whose logits are wanted
        for start, end in zip(starts, [*starts[1:], length], strict=True):
            part = {**kwargs, **_cut(kwargs, start, end, length, seen)}
            part["logits_to_keep"] = kept if end == length else 1
            output = forward(self, **part)
        return output

    in_chunks.reads_in_chunks = True
    return in_chunks


def keeps_cache(prepare: Callable) -> Callable:
    """A causal LM's `prepare_inputs_for_generation` that leaves a SparseK cache where it is.

    Phi-3's takes it away from texts that are longer than its short rotary factors are for, so that
    all is read anew into another one.
    """

    @functools.wraps(prepare)
    def kept(self, input_ids: torch.Tensor, past_key_values: Any = None, **kwargs: Any):
        switches = hasattr(self.config, "original_max_position_embeddings")
        plain = switches and isinstance(past_key_values, SparseKCache)
        called = GenerationMixin.prepare_inputs_for_generation if plain else prepare
        return called(self, input_ids, past_key_values=past_key_values, **kwargs)

    kept.keeps_cache = True
    return kept


@functools.cache
def _positional(forward: Callable) -> tuple[str, ...]:
    import inspect

    return tuple(inspect.signature(forward).parameters)[1:]


def _tokens(kwargs: dict[str, Any]) -> torch.Tensor | None:
    """input_ids [B, N], or the embeddings [B, N, hidden] in their place."""
    tokens = kwargs.get("input_ids")
    return kwargs.get("inputs_embeds") if tokens is None else tokens


def _chunk(model: Any, kwargs: dict[str, Any]) -> int | None:
    """Tokens of each row to read at once, or None to read all of them."""
    tokens, kept = _tokens(kwargs), kwargs.get("logits_to_keep", 0)
    if tokens is None or tokens.shape[1] == 1 or not isinstance(kept, int) or kept < 1:
        return None
    if not model.read_chunk or torch.is_grad_enabled():
        return None
    size = max(model.read_chunk // tokens.shape[0], kept, 1)
    if model.reads_once:
        cache = kwargs.get("past_key_values")
        size = max(kept, 1) if cache is not None and cache.get_seq_length() else tokens.shape[1]
    if tokens.shape[1] <= size or model.config._attn_implementation != ATTENTION:
        return None
    if any(kwargs.get(name) for name in ("output_attentions", "output_hidden_states")):
        return None
    if kwargs.get("labels") is not None or kwargs.get("cu_seq_lens_q") is not None:
        return None
    cache = kwargs.get("past_key_values")
    if cache is None:
        wanted = kwargs.get("use_cache")
        wanted = model.config.use_cache and not model.training if wanted is None else wanted
        # Positions that start again are packed documents, which no cache can hold.
        return size if wanted and kwargs.get("position_ids") is None else None
    return size if isinstance(cache, SparseKCache) else None


def _cut(kwargs: dict[str, Any], start: int, end: int, length: int, seen: int) -> dict[str, Any]:
    """Those of `kwargs` that run along the tokens, from `start` to `end`; `seen` came before."""
    cut = {}
    for name in _ALONG_TOKENS:
        value = kwargs.get(name)
        if value is not None:
            cut[name] = value[:, start:end]
    mask = kwargs.get("attention_mask")
    if mask is not None:
        alone = seen > 0 and mask.shape[1] == length  # of the new tokens, not of those before them
        cut["attention_mask"] = mask[:, start:end] if alone else mask[:, : seen + end]
    return cut
