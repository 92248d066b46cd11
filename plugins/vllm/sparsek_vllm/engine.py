"""Every name of vLLM that is used and that its plugin interface does not promise.

Who adapts this package to another vLLM reads this file: nothing else of the package imports from
vLLM, but `ModelRegistry.register_model`, the one documented call, and `VllmConfig` as a type.
"""

from __future__ import annotations

from torch import nn
from vllm.config import CompilationConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.mamba_utils import get_temporal_copy_spec
from vllm.model_executor.models.config import (
    MODELS_CONFIG_MAP,
    MambaModelConfig,
    VerifyAndUpdateConfig,
)
from vllm.model_executor.models.interfaces import (
    HasInnerState,
    IsAttentionFree,
    SupportsMambaPrefixCaching,
)
from vllm.model_executor.models.registry import ModelRegistry
from vllm.model_executor.models.transformers import TransformersForCausalLM
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.mamba_attn import (
    BaseMambaAttentionMetadata,
    BaseMambaAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum, register_backend
from vllm.v1.core.single_type_kv_cache_manager import MambaManager
from vllm.v1.kv_cache_interface import MambaSpec
from vllm.v1.kv_cache_spec_registry import register_kv_cache_spec

__all__ = [
    "Attention",
    "AttentionBackend",
    "BaseMambaAttentionMetadata",
    "BaseMambaAttentionMetadataBuilder",
    "MODELS_CONFIG_MAP",
    "MambaAttentionBackendEnum",
    "MambaBase",
    "MambaManager",
    "MambaModelConfig",
    "MambaSpec",
    "STATE_INTERFACES",
    "VerifyAndUpdateConfig",
    "attention_scale",
    "by_transformers",
    "dense_class",
    "get_forward_context",
    "get_temporal_copy_spec",
    "get_tensor_model_parallel_rank",
    "get_tensor_model_parallel_world_size",
    "is_known",
    "register_backend",
    "register_kv_cache_spec",
    "split_at",
    "unusual",
]

# What a model says of itself that has a state of constant size instead of a paged cache.
STATE_INTERFACES = (HasInnerState, IsAttentionFree, SupportsMambaPrefixCaching)


def is_known(architecture: str) -> bool:
    """Whether vLLM has a model class of this name."""
    return architecture in ModelRegistry.models


def dense_class(architecture: str) -> type[nn.Module]:
    """vLLM's own class for `architectures: [...]` of a config.json; imports its module."""
    return ModelRegistry.models[architecture].load_model_cls()


def by_transformers(dense: type[nn.Module]) -> bool:
    """Whether a class runs transformers' code of a family, with vLLM's layers put in."""
    return issubclass(dense, TransformersForCausalLM)


def attention_scale(attention: Attention) -> float:
    """The factor of the logits that a family's block gave its attention layer."""
    return float(attention.impl.scale)


def unusual(attention: Attention) -> str | None:
    """What a family's block asks of its attention that SparseK does not compute, or None."""
    impl = attention.impl
    if attention.sliding_window is not None:
        return f"a sliding window of {attention.sliding_window}"
    if getattr(impl, "alibi_slopes", None) is not None:
        return "ALiBi"
    if getattr(impl, "logits_soft_cap", None):
        return "a soft cap of its logits"
    if attention.has_sink or getattr(impl, "sinks", None) is not None:
        return "learned sinks"
    if attention.kv_sharing_target_layer_name is not None:
        return "keys of another layer"
    if attention.attn_type != "decoder":
        return f"attention of type {attention.attn_type}"
    return None


def split_at(operator: str) -> None:
    """Cut compiled graphs at an operator of ours, as vLLM cuts them at its attention."""
    if operator not in CompilationConfig._attention_ops:
        CompilationConfig._attention_ops.append(operator)
