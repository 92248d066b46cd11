"""Where SparseK meets transformers' attention: one mixin, one function, one mask.

Every family's attention block ends in `attention_interface(self, q, k, v, mask, **kwargs)` and
hands its own keyword arguments through. So the mixin only computes the scores and passes them on;
rotary positions, QK norms, fused projections and biases stay the family's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sparsek_kernels import sparsek_attention
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparsek_cli.errors import SparsekError
from sparsek_cli.models.cache.slots import SparseKCache, SparseKCacheLayer
from sparsek_cli.models.config import ATTENTION, DENSE_ATTENTION, layer_budget
from sparsek_cli.models.logits import Logits
from sparsek_cli.models.sliding import sliding_attention, sliding_mask

# What models hand on to attention functions and what does not change attention.
_HARMLESS = {
    "cache_position", "cu_seq_lens_k", "is_causal", "logits_to_keep", "max_length_k",
    "max_length_q", "num_items_in_batch", "output_hidden_states", "output_router_logits",
    "position_ids", "return_dict", "token_type_ids", "tokenizer", "use_cache",
}  # fmt: skip


class SparseKAttentionMixin:
    """Put in front of a family's attention class: scores in, the family's own forward after it.

    The module gains `scorer` (see scorer.py). Scores are made in `forward`, by no hook, so gradient
    checkpointing recomputes them with the rest and they get their gradients.

    Attributes:
        bounds: `cu_seq_lens_q` of the call at hand, where layers drop it: see `hand_on_bounds`.
    """

    bounds: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any):
        """As the family's attention; hidden_states [B, N, hidden_size]."""
        if self.bounds is not None:
            kwargs["cu_seq_lens_q"] = self.bounds
        if self.config._attn_implementation == ATTENTION:
            cache = kwargs.get("past_key_values")
            if cache is None:
                cache = kwargs.get("layer_past")  # GPT-NeoX's name
            kwargs["sparsek_cache"] = None if cache is None else cache.layers[self.layer_idx]
            kwargs["sparsek_scores"], kwargs["sparsek_slopes"] = self.scorer(
                hidden_states, position_ids=kwargs.get("position_ids")
            )
        return super().forward(hidden_states, *args, **kwargs)


def hand_on_bounds(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Before a decoder layer that drops arguments runs, or is recomputed: `Row.drops_arguments`."""
    for module in layer.children():
        if isinstance(module, SparseKAttentionMixin):
            module.bounds = kwargs.get("cu_seq_lens_q")


def sparsek_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sparsek_scores: torch.Tensor | None = None,
    sparsek_slopes: torch.Tensor | None = None,
    sparsek_cache: SparseKCacheLayer | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The one function that calls sparsek_kernels.

    Args:
        module: the attention module; gives `config` and `layer_idx`.
        query: [B, H, N, D]. key, value: [B, G, N, D], the new tokens only.
        attention_mask: None, or bool [B, N]: False marks padding among the new tokens.
        scaling: factor of the logits.
        dropout: must be 0: a dropped pair would be one the selection paid for.
        sparsek_scores: [B, G, N] float32. sparsek_slopes: [G].
        sparsek_cache: the layer's cache, whose state is advanced; None without a cache.
        cu_seq_lens_q: int32 [documents + 1], bounds of packed documents over all B * N tokens.
        softcap, s_aux: soft cap of the logits and sink logits [H], see `Logits`.

    Returns:
        Output [B, N, H, D] and None (there are no attention weights to return).

    Raises:
        SparsekError: no scores (not a converted model), dropout, a sliding window, padding in a
            packed batch, a 4D mask, or an argument that would change attention and is not known.
    """
    check_arguments(module, kwargs)
    logits = Logits.of(query, scaling, softcap, s_aux)
    if sparsek_scores is None and getattr(module.config, "sparsek", None) is not None:
        return _other_layer(
            module, query, key, value, attention_mask, logits, sliding_window, cu_seq_lens_q
        )
    if sparsek_scores is None:
        raise SparsekError(
            f"attention {ATTENTION!r} was set on a {type(module).__name__}, which has no scorer",
            hint="convert the model first (sparsek convert)",
        )
    _check_call(module, attention_mask, dropout, sliding_window, cu_seq_lens_q)
    budget = layer_budget(module.config, module.layer_idx)
    device = query.device.type
    if torch.is_autocast_enabled(device):
        # As autocast does for sdpa: rotary positions leave q and k in float32, v is in bf16.
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)

    def attend(q, k, v, scores, cu_seqlens):
        settings = {
            "topk": budget.topk,
            "window": budget.window,
            "sinks": budget.sinks,
            "slopes": sparsek_slopes,
            "gate": budget.gate,
            "cu_seqlens": cu_seqlens,
            **logits.settings,
        }
        # Inside, some sums are float32 on purpose: autocast must not turn them into bf16.
        with torch.autocast(q.device.type, enabled=False):
            if sparsek_cache is None:
                return sparsek_attention(q, k, v, scores, **settings)
            _check_layer(sparsek_cache, budget, k.dtype)
            out, sparsek_cache.state = sparsek_attention(
                q, k, v, scores, state=sparsek_cache.state, fresh=sparsek_cache.fresh, **settings
            )
            return out

    if attention_mask is not None:
        out = _attend_unpadded(attend, query, key, value, sparsek_scores, attention_mask)
    elif cu_seq_lens_q is not None:
        out = _attend_packed(attend, query, key, value, sparsek_scores, cu_seq_lens_q)
    else:
        out = attend(query, key, value, sparsek_scores, None)
    return out.transpose(1, 2).contiguous(), None


def check_arguments(module: nn.Module, arguments: dict[str, Any]) -> None:
    """What a family hands to its attention function counts; nothing of it is dropped unseen."""
    for name, value in arguments.items():
        if value is not None and value is not False and name not in _HARMLESS:
            raise SparsekError(
                f"{type(module).__name__} calls attention with {name}, which SparseK does not know",
                hint="the model's attention is of another kind and would be computed wrongly",
            )


def _check_call(module, attention_mask, dropout, sliding_window, cu_seq_lens_q) -> None:
    """Raises SparsekError where a call asks for what SparseK attention does not do."""
    if dropout:
        raise SparsekError(
            f"attention dropout is {dropout}",
            hint="SparseK trains without attention dropout: set it to 0 in the config",
        )
    if sliding_window is not None:
        raise SparsekError(
            f"layer {module.layer_idx} asks for a sliding window of {sliding_window}",
            hint="SparseK's own window takes its place: convert from a config without one",
        )
    if attention_mask is not None and attention_mask.ndim != 2:
        raise SparsekError(
            f"the attention mask has {attention_mask.ndim} dimensions",
            hint="SparseK attention is causal: pass a 2D padding mask",
        )
    if attention_mask is not None and cu_seq_lens_q is not None:
        raise SparsekError(
            "a packed batch came with a padding mask", hint="pass cu_seq_lens_q or a mask, not both"
        )


def _other_layer(module, query, key, value, mask, logits: Logits, window, cu_seqlens):
    """A layer of a converted model that slides: it attends as in the dense model."""
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


def _check_layer(layer: SparseKCacheLayer, budget: Any, dtype: torch.dtype) -> None:
    if layer.budget != budget:
        raise SparsekError(
            f"the cache was made for {layer.budget}, the model now has {budget}",
            hint="make a new cache after changing the budget",
        )
    if not layer.state.quantized and layer.state.keys.dtype != dtype:
        raise SparsekError(
            f"the cache holds {layer.state.keys.dtype}, the new keys are {dtype}",
            hint="use a cache inside of autocast or outside of it, not both",
        )


def _flatten(tensor: torch.Tensor) -> torch.Tensor:
    """[B, heads, N, ...] -> [1, heads, B * N, ...]: rows of the batch one after the other."""
    return tensor.transpose(0, 1).flatten(1, 2).unsqueeze(0)


def _unflatten(tensor: torch.Tensor, batch: int) -> torch.Tensor:
    """[1, heads, B * N, D] -> [B, heads, N, D]."""
    return tensor[0].unflatten(1, (batch, -1)).transpose(0, 1)


def _attend_packed(
    attend: Callable, query, key, value, scores, cu_seqlens: torch.Tensor
) -> torch.Tensor:
    """Documents packed over all rows of the batch."""
    cu_seqlens = cu_seqlens.to(device=query.device, dtype=torch.int32)
    packed = [_flatten(tensor) for tensor in (query, key, value, scores)]
    return _unflatten(attend(*packed, cu_seqlens), query.shape[0])


def _attend_unpadded(
    attend: Callable, query, key, value, scores, mask: torch.Tensor
) -> torch.Tensor:
    """Each row is a document without its padding; outputs at padding are 0."""
    lengths = mask.sum(dim=1, dtype=torch.int32)
    cu_seqlens = nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    (tokens,) = mask.flatten().nonzero(as_tuple=True)
    packed = [_flatten(tensor).index_select(2, tokens) for tensor in (query, key, value, scores)]
    flat = query.new_zeros((1, query.shape[1], mask.numel(), value.shape[-1]))
    if tokens.numel():
        flat = flat.index_copy(2, tokens, attend(*packed, cu_seqlens).to(flat.dtype))
    return _unflatten(flat, query.shape[0])


def sparsek_padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """Padding of the new tokens, bool [B, q_length], or None when there is none.

    Causality needs no mask, and padding among earlier tokens never reached the state. Layers that
    slide (`local_size`) have a mask of their own.
    """
    if local_size is not None:
        sizes = {"batch_size": batch_size, "q_length": q_length, "kv_length": kv_length}
        return sliding_mask(attention_mask, local_size=local_size, **sizes, **kwargs)
    if attention_mask is None:
        return None
    new = attention_mask[:, -q_length:].to(torch.bool)
    return None if bool(new.all()) else new


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
        return _other_layer(
            module, query, key, value, attention_mask, logits, window, cu_seq_lens_q
        )
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    bounds = cu_seq_lens_q.tolist()
    packed = [_flatten(tensor) for tensor in (query, key, value)]
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


def register_attention() -> None:
    """Make both attention functions known to transformers by name."""
    AttentionInterface.register(ATTENTION, sparsek_attention_forward)
    AttentionMaskInterface.register(ATTENTION, sparsek_padding_mask)
    AttentionInterface.register(DENSE_ATTENTION, dense_attention_forward)
    AttentionMaskInterface.register(DENSE_ATTENTION, dense_mask)


@contextmanager
def replaced_attention(name: str, make: Callable[[Callable], Callable]) -> Iterator[None]:
    """Within the block transformers calls `make(what it called before)` under this name.

    Registered, not assigned: an item assigned to transformers' mapping would hide every later
    registration.
    """
    before = ALL_ATTENTION_FUNCTIONS[name]
    AttentionInterface.register(name, make(before))
    try:
        yield
    finally:
        AttentionInterface.register(name, before)


def check_cache(cache: Any, implementation: str) -> None:
    """A SparseK cache belongs to SparseK attention and to nothing else.

    Raises:
        SparsekError: the cache and the attention implementation do not fit.
    """
    if cache is None or isinstance(cache, SparseKCache) == (implementation == ATTENTION):
        return
    if implementation == ATTENTION:
        raise SparsekError(
            f"past_key_values is a {type(cache).__name__}, which grows with the text",
            hint="pass a SparseKCache(model.config), or none and let the model make one",
        )
    raise SparsekError(
        f"past_key_values is a SparseKCache, but attention is {implementation!r}",
        hint="use a fresh cache inside and outside of dense_attention()",
    )
