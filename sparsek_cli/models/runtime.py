"""Switches on a loaded model: its budget, dense attention, and policies in place of scorers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from sparsek_cli.models.attention.modules import sparsek_attentions
from sparsek_cli.models.config import DENSE_ATTENTION, check_settings, kv_heads, sparse_layers
from sparsek_cli.models.scorer import RandomScorer


def set_budget(
    model: nn.Module,
    *,
    topk: int | list | None = None,
    window: int | None = None,
    sinks: int | None = None,
    gate: str | None = None,
    cache_dtype: str | None = None,
) -> dict[str, Any]:
    """Change how many pairs a model keeps; what is None stays. Caches made before are refused.

    Args:
        model: a converted model (wrapped or not).
        topk: as in the `sparsek` block: one integer, or one entry per layer.
        window, sinks, gate, cache_dtype: as in the `sparsek` block.

    Returns:
        The block as it was: `set_budget(model, **{k: old[k] for k in ("topk", ...)})` undoes it.

    Raises:
        UsageError: a value out of range.
    """
    config = sparsek_attentions(model)[0].config
    before = config.sparsek
    changes = {
        "topk": topk, "window": window, "sinks": sinks, "gate": gate, "cache_dtype": cache_dtype,
    }  # fmt: skip
    config.sparsek = check_settings(
        {**before, **{key: value for key, value in changes.items() if value is not None}},
        layers=config.num_hidden_layers,
        heads=kv_heads(config),
        sparse=sparse_layers(config),
    )
    return before


@contextmanager
def budget(model: nn.Module, **changes: Any) -> Iterator[None]:
    """`set_budget` for the length of a with block."""
    config = sparsek_attentions(model)[0].config
    before = set_budget(model, **changes)
    try:
        yield
    finally:
        config.sparsek = before


@contextmanager
def dense_attention(model: nn.Module) -> Iterator[None]:
    """Within the block the same weights attend densely: the teacher, and the dense baseline.

    Scorers are not run. Caches are transformers' own growing ones. Packed documents
    (`cu_seq_lens_q`, or position_ids that start again) stay apart, without an N x N mask.
    """
    config = sparsek_attentions(model)[0].config
    before = config._attn_implementation
    config._attn_implementation = DENSE_ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before


@contextmanager
def replaced_scorers(model: nn.Module, make: Callable[[nn.Module], nn.Module]) -> Iterator[None]:
    """Within the block, `make(attention)` gives each attention module the scorer that decides.

    A scorer has `slopes` [G] and `forward(hidden_states, position_ids)` -> scores [B, G, N] float32
    and the slopes; without stand-ins behind them nothing stands in for evicted pairs.
    """
    attentions = sparsek_attentions(model)
    before = [attention.scorer for attention in attentions]
    try:
        for attention, scorer in zip(attentions, before, strict=True):
            attention.scorer = make(attention).to(scorer.slopes.device)
        yield
    finally:
        for attention, scorer in zip(attentions, before, strict=True):
            attention.scorer = scorer


def random_scores(model: nn.Module, seed: int = 0):
    """Context manager: pairs are kept at random, by position, KV head, layer and seed."""
    return replaced_scorers(
        model,
        lambda attention: RandomScorer(
            kv_heads(attention.config), layer=attention.layer_idx, seed=seed
        ),
    )
