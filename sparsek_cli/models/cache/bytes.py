"""Bytes of caches: of a converted model and of its dense self, by arithmetic and as held.

A layer that slides keeps transformers' sliding cache, one with a state its own state: both are
bounded by construction and counted here too.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from sparsek_kernels import cache_bytes
from sparsek_kernels.state import topk_per_head
from transformers.cache_utils import LinearAttentionLayer

from sparsek_cli.errors import UsageError
from sparsek_cli.families.by_layer import kv_heads_of, pair_features, shared_layers
from sparsek_cli.models.config import (
    LayerBudget,
    head_dim,
    kv_heads,
    layer_budget,
    sparse_layers,
)

# What a container may take of its machine's memory: control groups, version 2 and 1.
_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
_FEW_SLOTS = 1 << 16  # per KV head: no machine is too small for them


def sparsek_cache_bytes(config: Any, dtype: torch.dtype, batch: int = 1) -> int:
    """Bytes a `SparseKCache` holds at any context: `SparseKCache.nbytes` equals it.

    Sliding layers count with their windows full; states (`SparseKCache.state_bytes`) are beyond it,
    their sizes are the family's affair. Per slot: key, value, position and score; see
    `sparsek_kernels.cache_bytes`. Gates log and kv keep some scores (no keys) beyond it.
    """
    heads, size = kv_heads(config), head_dim(config)
    total = sliding_bytes(config, None, dtype, batch)
    for layer in sparse_layers(config):
        budget = layer_budget(config, layer)
        stored = slot_dtype(budget, dtype)
        total += cache_bytes(batch, budget.topk, budget.window, budget.sinks, heads, size, stored)
    return total


def check_fits(config: Any) -> None:
    """Raises UsageError where the slots of one sequence need more memory than there is.

    Allocating would end the process, or say nothing but that memory is out. Whether a cache will
    lie in the GPUs or beside them is not known yet: what neither of them holds is refused, whether
    or not others use it; no more is promised.
    """
    heads = kv_heads(config)
    budgets = [layer_budget(config, layer) for layer in sparse_layers(config)]
    slots = [(topk_per_head(one.topk, heads), one.window, one.sinks) for one in budgets]
    most = max((max(topk) + window + sinks for topk, window, sinks in slots), default=0)
    if most <= _FEW_SLOTS:  # every prompt waits for this
        return
    needed = sum(
        # No wider type is certain here.
        cache_bytes(1, *held, heads, head_dim(config), slot_dtype(one, torch.float16))
        for one, held in zip(budgets, slots, strict=True)
    )
    if needed > _memory():
        raise UsageError(
            f"topk, window and sinks are {most:,} slots per KV head: {needed / 2**30:,.0f} GiB for "
            f"a sequence, and there are {_memory() / 2**30:,.0f} GiB of memory",
            hint='correct them, under "sparsek" in config.json or by set_budget(model, ...)',
        )


def _memory() -> int:
    """Bytes of the larger of two: all GPUs' memory, or what this process may have of the host's."""
    devices = range(torch.cuda.device_count())
    gpus = sum(torch.cuda.get_device_properties(device).total_memory for device in devices)
    return max(gpus, _host_memory())


def _host_memory() -> int:
    bounds = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in _LIMITS:
        try:
            limit = file.read_text(encoding="ascii").strip()
        except OSError:
            continue
        if limit.isdecimal():  # not "max"
            bounds.append(int(limit))
    return min(bounds)


def slot_dtype(budget: LayerBudget, dtype: torch.dtype) -> torch.dtype:
    """What a layer's slots hold keys and values in, where the model computes in `dtype`."""
    return torch.int8 if budget.cache_dtype == "int8" else dtype


def dense_cache_bytes(config: Any, tokens: int, dtype: torch.dtype, batch: int = 1) -> int:
    """Bytes of keys and values that a dense cache of the same model holds after `tokens` tokens."""
    pairs = batch * len(sparse_layers(config)) * kv_heads(config) * tokens
    held = 2 * pairs * head_dim(config) * dtype.itemsize
    return held + sliding_bytes(config, tokens, dtype, batch)


def pair_bytes(layer: Any) -> int:
    """Bytes of the keys and values, scales of codes included, that a layer of any cache holds."""
    held = [getattr(layer, name, None) for name in ("keys", "values")]
    state = getattr(layer, "state", None)
    if state is not None:
        held += [state.key_scale, state.value_scale]
    return sum(tensor.nbytes for tensor in held if tensor is not None)


def state_bytes(layer: Any) -> int:
    """Bytes of the states that a layer of any cache holds now: 0 for plain attention."""
    if not isinstance(layer, LinearAttentionLayer):
        return 0
    states = [*layer.conv_states.values(), *layer.recurrent_states.values()]
    return sum(state.nbytes for state in states if state is not None)


def sliding_bytes(config: Any, tokens: int | None, dtype: torch.dtype, batch: int = 1) -> int:
    """Bytes that the sliding layers hold after `tokens` tokens; None: once their windows are full.

    The window's last token is the query's own: one less is kept.
    """
    features = sum(pair_features(config, layer) for layer in _sliding_layers(config))
    return 2 * batch * features * _in_window(config, tokens) * dtype.itemsize


def sliding_pairs(config: Any, tokens: int | None = None) -> int:
    """Pairs of one sequence in all heads of the sliding layers; arguments of `sliding_bytes`."""
    heads = sum(kv_heads_of(config, layer) for layer in _sliding_layers(config))
    return heads * _in_window(config, tokens)


def _sliding_layers(config: Any) -> list[int]:
    """Those that hold keys of their own."""
    types = getattr(config, "layer_types", None) or ()
    own = types[: len(types) - shared_layers(config)]
    return [layer for layer, kind in enumerate(own) if kind == "sliding_attention"]


def _in_window(config: Any, tokens: int | None) -> int:
    """Tokens that a sliding layer holds after `tokens` of them; arguments of `sliding_bytes`."""
    if not _sliding_layers(config):
        return 0
    kept = config.sliding_window - 1
    return kept if tokens is None else min(tokens, kept)
