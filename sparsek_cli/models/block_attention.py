"""Attention of layers that are not SparseK's, block by block: no N x N mask is made.

Sliding-window layers of models that mix layers keep transformers' sliding cache, which is bounded
by construction. Attention to everything is here for models that cap their logits, and for
calibration.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from transformers.masking_utils import sdpa_mask

from sparsek_cli.errors import SparsekError
from sparsek_cli.models.logits import Logits, masked_attention

# Queries of a sliding layer that attend at once: with windows up to this length a mask has at
# most twice as many columns as rows.
_QUERIES = 1024


def sliding_mask(attention_mask: torch.Tensor | None, **kwargs: Any) -> torch.Tensor | None:
    """The mask of sliding layers: transformers' where there is padding, else none.

    `sliding_attention` needs none, so that long sequences cost no N x N mask.

    Args:
        attention_mask: [B, M], 0 at padding; None: no padding. kwargs: of transformers' sdpa_mask.

    Returns:
        bool [B, 1, N, M], True where a query may look, or None.
    """
    if attention_mask is None or bool(attention_mask.all()):
        return None
    return sdpa_mask(attention_mask=attention_mask, **kwargs)


def sliding_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    window: int,
    logits: Logits,
    mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each query attends to the last `window` keys up to its own.

    Args:
        query: [B, H, N, D]. key, value: [B, G, M, D]; the N queries are the last of M tokens.
        mask: from `sliding_mask`. cu_seqlens: bounds of packed documents over all B * N tokens.

    Returns:
        [B, H, N, D].
    """
    if mask is not None:
        return masked_attention(query, key, value, mask, logits)
    if cu_seqlens is None:
        return _by_blocks(query, key, value, window, logits)
    batch = query.shape[0]
    packed = [x.transpose(0, 1).flatten(1, 2)[None] for x in (query, key, value)]
    bounds = cu_seqlens.tolist()
    parts = [
        _by_blocks(*(x[:, :, start:end] for x in packed), window, logits)
        for start, end in zip(bounds, bounds[1:], strict=False)
        if end > start
    ]
    return torch.cat(parts, dim=2)[0].unflatten(1, (batch, -1)).transpose(0, 1)


def causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, logits: Logits
) -> torch.Tensor:
    """Each query attends to all keys up to its own; shapes as in `sliding_attention`, N = M."""
    if not logits.plain:
        return _by_blocks(query, key, value, key.shape[2], logits)
    shared = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=logits.scale, enable_gqa=shared
    )


def _by_blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int, logits: Logits
) -> torch.Tensor:
    queries, before = query.shape[2], key.shape[2] - query.shape[2]
    parts = []
    for start in range(0, queries, _QUERIES):
        rows = torch.arange(start, min(start + _QUERIES, queries), device=query.device) + before
        first = max(0, start + before - window + 1)
        last = before + min(start + _QUERIES, queries)
        columns = torch.arange(first, last, device=query.device)
        seen = (columns <= rows[:, None]) & (columns > rows[:, None] - window)
        keys, values = (x[:, :, first:last] for x in (key, value))
        block = query[:, :, start : start + _QUERIES]
        parts.append(masked_attention(block, keys, values, seen, logits))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def sliding_layer(module, query, key, value, mask, logits: Logits, window, cu_seqlens):
    """Attention of a converted model's sliding layer, as transformers wants it: the dense model's.

    Args:
        query: [B, H, N, D]. key, value: [B, G, M, D]. mask, cu_seqlens: as in `sliding_attention`.
        window: newest keys that a query sees; None: the module's own.

    Returns:
        [B, N, H, D], and no weights.

    Raises:
        SparsekError: it has no window, so it is a layer that should have had a scorer.
    """
    if window is None:  # Qwen2-MoE slides by its mask alone
        window = getattr(module, "sliding_window", None)
    if window is None:
        raise SparsekError(
            f"{type(module).__name__} has no scorer: a converted model was loaded with the class "
            "of its base",
            hint="load it with AutoModelForCausalLM, after `import sparsek_cli.models`",
        )
    out = sliding_attention(
        query, key, value, window=window, logits=logits, mask=mask, cu_seqlens=cu_seqlens
    )
    return out.transpose(1, 2).contiguous(), None
