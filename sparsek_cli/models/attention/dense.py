"""Dense attention of a converted model's base: torch's own, document by document."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sparsek_cli.models.attention.arguments import check_arguments
from sparsek_cli.models.attention.packed_and_padded import flatten
from sparsek_cli.models.attention.sparsek import sparsek_padding_mask
from sparsek_cli.models.block_attention import sliding_layer
from sparsek_cli.models.logits import Logits


def dense_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cu_seq_lens_q: torch.Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Ordinary causal attention (torch's sdpa), document by document where they are packed.

    Shapes as in `sparsek_attention_forward`. One causal call per document keeps torch's fast
    kernels and never builds the N x N mask that packing would otherwise need.
    """
    known = ("scaling", "dropout")
    check_arguments(module, {name: kwargs[name] for name in kwargs if name not in known})
    logits = Logits.of(query, kwargs.get("scaling"), softcap, s_aux)
    if sliding_window is not None or not logits.plain:
        window = key.shape[2] if sliding_window is None else sliding_window
        return sliding_layer(
            module, query, key, value, attention_mask, logits, window, cu_seq_lens_q
        )
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    bounds = cu_seq_lens_q.tolist()
    packed = [flatten(tensor) for tensor in (query, key, value)]
    parts = [
        sdpa_attention_forward(
            module, *(tensor[:, :, start:end] for tensor in packed), None, **kwargs
        )[0]
        for start, end in zip(bounds, bounds[1:], strict=False)
        if end > start
    ]
    out = torch.cat(parts, dim=1)  # [1, B * N, H, D]
    return out.reshape(query.shape[0], -1, *out.shape[2:]), None


def dense_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    q_offset: int | torch.Tensor = 0,
    **kwargs: Any,
) -> torch.Tensor | None:
    """As sdpa's mask, but none for whole unpadded (perhaps packed) sequences, nor for one query
    after everything, where transformers gives one while a CUDA graph is captured.

    Layers that slide (`local_size`) have a mask of their own.
    """
    if local_size is not None:
        return sparsek_padding_mask(
            batch_size, q_length, kv_length, attention_mask, local_size, q_offset=q_offset, **kwargs
        )
    # A tensor is the place in a cache of fixed length, whose end may be empty.
    last = q_length == 1 and isinstance(q_offset, int) and q_offset + 1 == kv_length
    if attention_mask is None and (q_length == kv_length or last):
        return None
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        attention_mask=attention_mask,
        **kwargs,
    )
