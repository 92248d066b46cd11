"""Where SparseK meets transformers' attention: one mixin, one function, one mask.

Every family's attention block ends in `attention_interface(self, q, k, v, mask, **kwargs)` and
hands its own keyword arguments through. So the mixin only computes the scores and passes them on;
rotary positions, QK norms, fused projections and biases stay the family's business.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from sparsek_kernels import SparseKState, sparsek_attention
from torch import nn

from sparsek_cli.converted import is_converted
from sparsek_cli.errors import SparsekError
from sparsek_cli.models.attention.arguments import check_arguments
from sparsek_cli.models.attention.packed_and_padded import (
    attend_packed,
    attend_unpadded,
    counted_positions,
)
from sparsek_cli.models.attention.sharing import Stored, hand_on, layer_of_scores
from sparsek_cli.models.autocast import without_autocast
from sparsek_cli.models.block_attention import sliding_layer, sliding_mask
from sparsek_cli.models.cache.layers import SparseKCacheLayer
from sparsek_cli.models.cache.slots import SparseKCache
from sparsek_cli.models.config import ATTENTION, GATES, layer_budget
from sparsek_cli.models.logits import Logits

# Who tunes prefixes passes no cache, and cannot leave it out either.
_OF_PEFT = (
    "PEFT's prefix tuning brings one: take LoraConfig or PromptTuningConfig, or `sparsek finetune "
    "MODEL OUT --recipe lora --data FILE`"
)


class SparseKAttentionMixin:
    """Put in front of a family's attention class: scores in, the family's own forward after it.

    The module gains `scorer` (see scorer.py). Scores are made in `forward`, by no hook, so gradient
    checkpointing recomputes them with the rest and they get their gradients.

    Attributes:
        bounds: `cu_seq_lens_q` of the call at hand, where layers drop it: see `hand_on_bounds`.
        is_read: later layers without keys of their own read those of this one, see sharing.py.
    """

    bounds: torch.Tensor | None = None
    is_read = False

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any):
        """As the family's attention; hidden_states [B, N, hidden_size]."""
        device = hidden_states.device.type
        if hidden_states.dtype == torch.float32 and torch.is_autocast_enabled(device):
            # Autocast would do so in each projection, and every one would keep a copy of its own;
            # the scorer kept the float32 one.
            hidden_states = hidden_states.to(torch.get_autocast_dtype(device))
        if self.bounds is not None:
            kwargs["cu_seq_lens_q"] = self.bounds
        if self.config._attn_implementation == ATTENTION:
            cache = kwargs.get("past_key_values")
            if cache is None:
                cache = kwargs.get("layer_past")  # GPT-NeoX's name
            layer = None if cache is None else cache.layers[self.layer_idx]
            positions = kwargs.get("position_ids")
            if positions is None and getattr(self.scorer, "reads_positions", False):
                seen = None if layer is None or layer.state is None else layer.state.seen
                mask, bounds = kwargs.get("attention_mask"), kwargs.get("cu_seq_lens_q")
                positions = counted_positions(hidden_states, mask, bounds, seen)
            scores, slopes, *stand_ins = self.scorer(hidden_states, position_ids=positions)
            kwargs |= {
                "sparsek_cache": layer, "sparsek_scores": scores, "sparsek_slopes": slopes
            }  # fmt: skip
            if stand_ins:
                (kwargs["sparsek_stand_ins"],) = stand_ins
            if self.is_read:
                kwargs["sparsek_stores"] = Stored(self.layer_idx, scores, slopes, layer)
                hand_on(kwargs["shared_kv_states"], kwargs["sparsek_stores"])
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
    sparsek_stand_ins: torch.Tensor | None = None,
    sparsek_cache: SparseKCacheLayer | None = None,
    sparsek_stores: Stored | None = None,
    sparsek_reads: Stored | None = None,
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
        sparsek_stand_ins: [H, M, 2 D + 2], pairs in place of evicted ones; None: there are none.
        sparsek_cache: the layer's cache, whose state is advanced; None without a cache.
        sparsek_stores: where it leaves its state for layers that read it, see sharing.py.
        sparsek_reads: what an earlier layer stored; key, value and scores are that layer's.
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
    if sparsek_scores is None and is_converted(module.config):
        return sliding_layer(
            module, query, key, value, attention_mask, logits, sliding_window, cu_seq_lens_q
        )
    if sparsek_scores is None:
        raise SparsekError(
            f"attention {ATTENTION!r} was set on a {type(module).__name__}, which has no scorer",
            hint="convert the model first (sparsek convert)",
        )
    _check_call(module, attention_mask, dropout, sliding_window, cu_seq_lens_q)
    layer = layer_of_scores(module, {"sparsek_reads": sparsek_reads})
    budget = layer_budget(module.config, layer)
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
            "stand_ins": sparsek_stand_ins,
            **logits.settings,
        }
        # Inside, some sums are float32 on purpose: autocast must not turn them into bf16.
        with without_autocast(q.device.type):
            if sparsek_reads is not None:
                return sparsek_reads.attend(q, k, v, scores, settings)
            if sparsek_cache is None:
                return sparsek_attention(q, k, v, scores, **settings)
            state = sparsek_cache.state_to_read()
            _check_layer(sparsek_cache.budget, state, budget, k.dtype)
            if sparsek_stores is not None:
                wanted = (q, k, v, scores, sparsek_slopes)
                if sparsek_stand_ins is not None:
                    wanted = (*wanted, sparsek_stand_ins)
                sparsek_stores.keep_state(steps=_in_place(wanted, budget.gate, cu_seqlens))
            out, sparsek_cache.state = sparsek_attention(
                q, k, v, scores, state=state, fresh=sparsek_cache.fresh, **settings
            )
            return out

    if attention_mask is not None:
        out = attend_unpadded(attend, query, key, value, sparsek_scores, attention_mask)
    elif cu_seq_lens_q is not None:
        out = attend_packed(attend, query, key, value, sparsek_scores, cu_seq_lens_q)
    else:
        out = attend(query, key, value, sparsek_scores, None)
    return out.transpose(1, 2).contiguous(), None


def _in_place(tensors: tuple[torch.Tensor, ...], gate: str, bounds: torch.Tensor | None) -> bool:
    """Whether a call puts one token of each row into its slot, and attends to all slots then."""
    learns = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return tensors[0].shape[2] == 1 and bounds is None and gate == GATES[0] and not learns


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


def _check_layer(made_for: Any, state: SparseKState, budget: Any, dtype: torch.dtype) -> None:
    if made_for != budget:
        raise SparsekError(
            f"the cache was made for {made_for}, the model now has {budget}",
            hint="make a new cache after changing the budget",
        )
    if not state.quantized and state.keys.dtype != dtype:
        raise SparsekError(
            f"the cache holds {state.keys.dtype}, the new keys are {dtype}",
            hint="use a cache inside of autocast or outside of it, not both",
        )


def sparsek_padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    q_offset: int = 0,
    **kwargs: Any,
) -> torch.Tensor | None:
    """Padding of the new tokens, bool [B, q_length], or None when there is none.

    Causality needs no mask, and padding among earlier tokens never reached the state. Layers that
    slide (`local_size`) have a mask of their own.

    Args:
        attention_mask: [B, M] over all tokens from the first, as transformers has it, further ones
            included; or over the new ones alone.
        q_offset: tokens before the new ones.

    Raises:
        SparsekError: a mask of some of the tokens.
    """
    if local_size is not None:
        sizes = {"batch_size": batch_size, "q_length": q_length, "kv_length": kv_length}
        return sliding_mask(
            attention_mask, local_size=local_size, q_offset=q_offset, **sizes, **kwargs
        )
    if attention_mask is None:
        return None
    new = _of_new_tokens(attention_mask, q_length, q_offset).to(torch.bool)
    return None if bool(new.all()) else new


def _of_new_tokens(mask: torch.Tensor, q_length: int, q_offset: int) -> torch.Tensor:
    """[B, q_length] of a mask [B, M]."""
    covered = mask.shape[-1]
    if covered == q_length:
        return mask
    if covered < q_offset + q_length:
        before = f", {q_offset} of them read before" if q_offset else ""
        raise SparsekError(
            f"the attention mask covers {covered} of {q_offset + q_length} tokens{before}",
            hint="give a mask over all tokens from the first, or over the new ones alone",
        )
    return mask[:, q_offset : q_offset + q_length]


def check_cache(cache: Any, implementation: str) -> None:
    """A SparseK cache belongs to SparseK attention and to nothing else.

    Raises:
        SparsekError: the cache and the attention implementation do not fit.
    """
    if cache is None or isinstance(cache, SparseKCache) == (implementation == ATTENTION):
        return
    if implementation == ATTENTION:
        hint = "pass a SparseKCache(model.config), or none and let the model make one"
        if "peft" in sys.modules:
            hint += f"; {_OF_PEFT}"
        raise SparsekError(
            f"past_key_values is a {type(cache).__name__}, which grows with the text", hint=hint
        )
    raise SparsekError(
        f"past_key_values is a SparseKCache, but attention is {implementation!r}",
        hint="use a fresh cache inside and outside of dense_attention()",
    )
