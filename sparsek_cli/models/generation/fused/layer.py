"""A whole decoder layer by own kernels: norm, attention, residual, norm, MLP, residual."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparsek_cli.models.attention.sparsek import SparseKAttentionMixin
from sparsek_cli.models.cache.slots import SparseKCache
from sparsek_cli.models.config import ATTENTION
from sparsek_cli.models.generation.fused.parts import (
    Forward,
    gated_parts,
    is_map,
    is_plain,
    norm_of,
    own_forward,
    rows_of,
)
from sparsek_cli.models.scorer import SparseKMlpScorer, SparseKScorer

_HARMLESS = {"position_ids", "use_cache", "cache_position", "logits_to_keep", "return_dict"}


def fused_layer(module: nn.Module, rows: int) -> Forward | None:
    """The whole of a decoder layer: norm, attention, residual, norm, gated MLP, residual."""
    if not isinstance(getattr(module, "self_attn", None), SparseKAttentionMixin):
        return None
    layer = FusedLayer.of(module)
    if layer is None:
        return None
    own = own_forward(module)

    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any):
        cache, turn = kwargs.get("past_key_values"), kwargs.get("position_embeddings")
        others = (
            value
            for name, value in kwargs.items()
            if name not in _HARMLESS and name not in ("past_key_values", "position_embeddings")
        )
        x = rows_of(hidden_states, layer.first.weight, rows)
        if (
            args
            or x is None
            or not isinstance(cache, SparseKCache)
            or not isinstance(turn, tuple)
            or any(part.shape[-1] != layer.head_dim or part.shape[1] != 1 for part in turn)
            or any(value is not None and value is not False for value in others)
        ):
            return own(hidden_states, *args, **kwargs)
        return layer(x, cache, tuple(part[:, 0] for part in turn))[:, None]

    return forward


class FusedLayer:
    """The launches of one decoder layer."""

    def __init__(self, attention: Any, first: Any, second: Any, mlp: tuple, scorer: Any):
        self.attention, self.first, self.second, self.mlp = attention, first, second, mlp
        self.scorer = scorer
        self.head_dim = attention.head_dim
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.maps = tuple((part.weight, part.bias) for part in projections)
        norms = [norm_of(getattr(attention, name, None)) for name in ("q_norm", "k_norm")]
        self.head_norms = None if None in norms else norms

    @classmethod
    def of(cls, module: Any) -> FusedLayer | None:
        """None where a part is missing or of another kind."""
        attention = module.self_attn
        names = ("q_proj", "k_proj", "v_proj", "o_proj")
        maps = [getattr(attention, name, None) for name in names]
        first = norm_of(getattr(module, "input_layernorm", None))
        second = norm_of(getattr(module, "post_attention_layernorm", None))
        mlp, scorer = gated_parts(getattr(module, "mlp", None)), _scorer_of(attention.scorer)
        if None in (first, second, mlp, scorer) or not all(map(is_map, maps)):
            return None
        if not (is_plain(module, below=True) and is_plain(attention, below=True)):
            return None
        if len({part.bias is None for part in maps[:3]}) > 1:
            return None
        if getattr(attention, "attn_logit_softcapping", None) or hasattr(attention, "sinks"):
            return None  # too small a difference to show in what is compared
        dim = getattr(attention, "head_dim", None)
        if not isinstance(dim, int) or dim % 2 or any(part.out_features % dim for part in maps[:3]):
            return None
        return cls(attention, first, second, mlp, scorer)

    def __call__(self, x: torch.Tensor, cache: SparseKCache, turn: tuple) -> torch.Tensor:
        """[rows, K] after the layer, of [rows, K] before it; the token enters the cache."""
        from sparsek_kernels.triton import linears

        attention, (gate, up, down) = self.attention, self.mlp
        q, k, v, scores = linears.project(
            x, self.maps, self.head_dim, norm=self.first, scorer=self.scorer,
            turn=None if self.head_norms else turn,
        )  # fmt: skip
        if self.head_norms:
            of_q, of_k = self.head_norms
            linears.norm_rotate(q, k, of_q.weight, of_k.weight, of_q.eps, turn)
        q, k, v = (part[:, :, None] for part in (q, k, v))
        k, v = cache.update(k, v, attention.layer_idx)
        out, _ = ALL_ATTENTION_FUNCTIONS[ATTENTION](
            attention, q, k, v, None, scaling=attention.scaling,
            sparsek_scores=scores[:, :, None], sparsek_slopes=attention.scorer.slopes,
            sparsek_stand_ins=attention.scorer.stand_ins,
            sparsek_cache=cache.layers[attention.layer_idx],
        )  # fmt: skip
        last = attention.o_proj
        x = linears.linear(out.flatten(1), last.weight, last.bias, residual=x)
        inner = linears.gated(x, (gate.weight, gate.bias), (up.weight, up.bias), norm=self.second)
        return linears.linear(inner, down.weight, down.bias, residual=x)


def _scorer_of(scorer: Any):
    from sparsek_kernels.triton.linears import Scorer

    if not is_plain(scorer):
        return None
    if type(scorer) is SparseKScorer:
        return Scorer(scorer.weight, scorer.bias)
    if type(scorer) is SparseKMlpScorer:
        hidden = scorer.hidden_weight, scorer.hidden_bias, scorer.out_weight
        return Scorer(scorer.weight, scorer.bias, *hidden)
    return None
