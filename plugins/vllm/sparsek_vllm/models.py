"""A family's class of vLLM with SparseK attention: derived from it, blocks changed in place."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from vllm import ModelRegistry

from sparsek_cli.converted import dense_config
from sparsek_cli.errors import SparsekError
from sparsek_cli.families import TABLE
from sparsek_cli.families.positions import rope_type
from sparsek_cli.families.varying_positions import LONGROPE, chosen
from sparsek_cli.models.cache.bytes import slot_dtype
from sparsek_cli.models.config import head_dim, kv_heads, layer_budget
from sparsek_cli.models.scorer import new_scorer
from sparsek_cli.output.parts import check_parts
from sparsek_vllm import FAMILIES, engine
from sparsek_vllm.heads import query_heads_of, reordered
from sparsek_vllm.layer import SparseKLayer, register_layer
from sparsek_vllm.limits import check
from sparsek_vllm.sizes import layer_bytes, shared_heads


class _Attention:
    """A block's layer, to be called as vLLM's `Attention`: it knows the block's input already."""

    def __init__(self, layer: nn.Module, hidden_states: torch.Tensor):
        self.layer, self.hidden_states = layer, hidden_states

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return self.layer(query, key, value, self.hidden_states)

    __call__ = forward


class _Block:
    """A family's attention block as its own forward sees it: `attn` also gets hidden states."""

    def __init__(self, block: nn.Module, hidden_states: torch.Tensor):
        self.block = block
        self.attn = _Attention(block.attn, hidden_states.flatten(0, -2))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)


@cache
def sparsek_block(dense: type[nn.Module], forward: Callable) -> type[nn.Module]:
    """An attention block that hands its input on to its SparseK layer, where it is scored.

    Args:
        forward: what computes the block: its class's own, or what vLLM made of it.
    """
    place = list(inspect.signature(forward).parameters).index("hidden_states") - 1

    class SparseKBlock(dense):
        def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[place]
            return forward(_Block(self, hidden), *args, **kwargs)

    SparseKBlock.__name__ = SparseKBlock.__qualname__ = f"SparseK{dense.__name__}"
    return SparseKBlock


class SparseKServed:
    """Put in front of a family's causal LM of vLLM."""

    supports_pp = False
    supports_lora = False

    def __init__(self, *, vllm_config, prefix: str = ""):
        check(vllm_config)
        config = vllm_config.model_config.hf_config
        config.rope_parameters = _positions(config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._orders = _replace_attention(self, vllm_config)
        self._head_dim = head_dim(config)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return super().load_weights(reordered(weights, self._orders, self._head_dim))

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple:
        """A prefix is kept by copying its block."""
        return (engine.get_temporal_copy_spec,)


def _positions(config: Any) -> dict[str, Any]:
    """`rope_parameters` by which vLLM turns keys as transformers does, at any --max-model-len."""
    rope = config.rope_parameters
    if rope_type(rope) == LONGROPE:  # vLLM scales by the lengths alone
        _, scale = ROPE_INIT_FUNCTIONS[LONGROPE](config)
        rope = rope | {"short_mscale": scale, "long_mscale": scale}
    return chosen(rope, config.max_position_embeddings)


class SparseKByTransformers(SparseKServed):
    """Put in front of the class by which vLLM runs a family's own code of transformers."""

    def _patch_config(self) -> None:
        # vLLM builds the dense model from it, whose attention it then calls.
        fields = dense_config(self.config.to_dict())
        self.config = self.text_config = AutoConfig.for_model(**fields)
        super()._patch_config()


def _replace_attention(model: nn.Module, vllm_config) -> dict[str, list[int]]:
    """Change every attention block; returns the order of KV heads where it is not the file's."""
    config = vllm_config.model_config.hf_config
    computes_in = vllm_config.model_config.dtype
    ranks = engine.get_tensor_model_parallel_world_size()
    rank = engine.get_tensor_model_parallel_rank()
    known = vllm_config.compilation_config.static_forward_context
    blocks = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "attn", None), engine.Attention)
    ]
    if len(blocks) != config.num_hidden_layers:
        raise SparsekError(
            f"{len(blocks)} attention layers in vLLM's {type(model).__name__}, the model has "
            f"{config.num_hidden_layers}",
            hint="serve with transformers: sparsek serve --engine transformers",
        )
    orders: dict[str, list[int]] = {}
    group = config.num_attention_heads // kv_heads(config)
    for layer, (name, block) in enumerate(blocks):
        attention = block.attn
        odd = engine.unusual(attention)
        if attention.head_size != head_dim(config):
            # vLLM would cut the projections to its own size without a word.
            odd = f"heads of size {attention.head_size} on vLLM, {head_dim(config)} in the model"
        if odd is not None:
            raise SparsekError(
                f"layer {layer} asks for {odd}, which is not computed here",
                hint="serve with transformers: sparsek serve --engine transformers",
            )
        budget = layer_budget(config, layer)
        dealt = shared_heads(config, layer, ranks)
        flat = [head for heads in dealt for head in heads]
        if ranks <= kv_heads(config) and flat != sorted(flat):
            orders[name] = flat
        scorer = new_scorer(config, layer)
        del known[attention.layer_name]
        block.attn = SparseKLayer(
            attention.layer_name,
            budget=budget,
            heads=dealt[rank],
            all_heads=kv_heads(config),
            queries=query_heads_of(dealt[rank], rank, attention.num_heads, group),
            head_dim=attention.head_size,
            scale=engine.attention_scale(attention),
            dtype=slot_dtype(budget, computes_in),
            bytes_per_block=layer_bytes(config, layer, computes_in, ranks),
            scorer=scorer,
        )
        known[attention.layer_name] = block.attn
        block.scorer = scorer
        # Where vLLM fused the projections of a block, it hung another forward on the block itself.
        fused = vars(block).pop("forward", None)
        forward = type(block).forward if fused is None else fused.__func__
        block.__class__ = sparsek_block(type(block), forward)
    return orders


class SparseKConfigHook(engine.VerifyAndUpdateConfig):
    """vLLM's hook for a model's settings: refuses early, and keeps states as for Mamba."""

    @classmethod
    def verify_and_update_config(cls, vllm_config) -> None:
        check(vllm_config)
        check_parts(Path(vllm_config.model_config.model))
        engine.MambaModelConfig.verify_and_update_config(vllm_config)


def architectures() -> dict[str, str]:
    """Converted class name, as config.json has it -> vLLM's dense one."""
    rows = (TABLE[family] for family in FAMILIES)
    return {f"SparseK{row.causal_lm}": row.causal_lm for row in rows}


def register_models() -> None:
    """Enter every served family with vLLM; may be called again."""
    import sparsek_cli.models  # noqa: F401  registers the configs with transformers

    register_layer()
    for served, dense in architectures().items():
        if not engine.is_known(dense):
            continue
        ModelRegistry.register_model(served, f"{__name__}:{served}")
        engine.MODELS_CONFIG_MAP[served] = SparseKConfigHook


@cache
def served_class(name: str) -> type[nn.Module]:
    """The class for one of `architectures()`, derived when it is first asked for."""
    dense = engine.dense_class(architectures()[name])
    served = SparseKByTransformers if engine.by_transformers(dense) else SparseKServed
    return type(name, (served, dense, *engine.STATE_INTERFACES), {"__module__": __name__})


def __getattr__(name: str) -> type[nn.Module]:
    """Classes by name, which is how vLLM asks for them."""
    if name in architectures():
        return served_class(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
