"""Why a decoding step cannot be one CUDA graph."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from sparsek_kernels import dispatch
from torch import nn

from sparsek_cli import quantised
from sparsek_cli.models.cache.layers import SparseKCacheLayer
from sparsek_cli.models.cache.slots import SparseKCache

_LOG = logging.getLogger("sparsek_cli")
_logged: set[str] = set()


def why_eager(model: nn.Module, cache: SparseKCache) -> str | None:
    """Why a decoding step cannot be a CUDA graph, logged once for each reason; None if it can."""
    if not has_graphs(model.device):
        return f"device {model.device.type}"
    reason = _obstacle(model, cache)
    if reason is not None:
        say_once(f"decoding runs eagerly, without a CUDA graph: {reason}")
    return reason


def _obstacle(model: nn.Module, cache: SparseKCache) -> str | None:
    if not all(isinstance(layer, SparseKCacheLayer) for layer in cache.layers):
        return "some layers have a cache of another kind"
    gates = {layer.budget.gate for layer in cache.layers} - {"straight_through"}
    if gates:
        return f"gate {gates.pop()!r} keeps a list that grows"
    backend, why = dispatch.explain(model.device, model.dtype)
    if backend != "triton":
        return f"attention runs on the {backend} backend: {why}"
    if quantised.stays_packed(model.config):
        return "packed weights are computed with by another library"
    if model.training:
        return "the model is in training mode"
    if torch.is_autocast_enabled("cuda"):
        return "autocast is on"
    if torch.cuda.is_current_stream_capturing():
        return "another graph is being captured"
    if len({tensor.device for tensor in _tensors(model)}) > 1:
        return "the weights are on several devices"
    for module in model.modules():
        if module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"):
            return f"{type(module).__name__} has hooks, which a graph would not call"
    return None


def has_graphs(device: torch.device) -> bool:
    return device.type == "cuda"


def say_once(message: str) -> None:
    if message not in _logged:
        _logged.add(message)
        _LOG.info(message)


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()
