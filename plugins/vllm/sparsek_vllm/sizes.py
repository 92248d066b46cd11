"""Bytes of the blocks that one request has on each rank, by arithmetic: vLLM is not imported."""

from __future__ import annotations

from typing import Any

import torch
from sparsek_kernels.state import SlotLayout, topk_per_head

from sparsek_cli.families import TABLE, Row
from sparsek_cli.models.cache.bytes import slot_dtype
from sparsek_cli.models.config import LayerBudget, head_dim, kv_heads, layer_budget
from sparsek_vllm.blocks import block_bytes
from sparsek_vllm.heads import can_deal, dealt_heads, plain_heads


def family_row(config: Any) -> Row:
    """The row of sparsek's table for a converted model's config."""
    return TABLE[config.model_type.removeprefix("sparsek_")]


def shared_heads(config: Any, layer: int, ranks: int) -> list[list[int]]:
    """KV heads of each rank in a layer: dealt by their slots where the family allows it."""
    heads = kv_heads(config)
    if can_deal(family_row(config)):
        return dealt_heads(topk_per_head(layer_budget(config, layer).topk, heads), ranks)
    return plain_heads(heads, ranks)


def layer_bytes(config: Any, layer: int, dtype: torch.dtype, ranks: int) -> int:
    """Bytes of a request's block in one layer, on every rank: as the fullest one needs.

    Args:
        dtype: in which the model computes.
        ranks: of tensor parallelism; they divide the KV heads, or the KV heads divide them.
    """
    budget = layer_budget(config, layer)
    return max(
        block_bytes(_layout(config, budget, heads), head_dim(config), slot_dtype(budget, dtype))
        for heads in shared_heads(config, layer, ranks)
    )


def request_bytes(config: Any, dtype: torch.dtype, ranks: int = 1) -> int:
    """Bytes of all blocks of one request on each rank; arguments of `layer_bytes`."""
    layers = range(config.num_hidden_layers)
    return sum(layer_bytes(config, layer, dtype, ranks) for layer in layers)


def _layout(config: Any, budget: LayerBudget, heads: list[int]) -> SlotLayout:
    every = topk_per_head(budget.topk, kv_heads(config))
    return SlotLayout(tuple(every[head] for head in heads), budget.window, budget.sinks)
