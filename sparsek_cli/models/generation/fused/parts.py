"""Own kernels for norms, maps, gated MLPs and rotary positions; None for other modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from sparsek_cli.models.positions import FIXED

Forward = Callable[..., Any]
# Of transformers' rotary positions; the others change frequencies with the position.
_FIXED_FREQUENCIES = {"default", "linear", "llama3", "yarn", *FIXED.values()}


def own_forward(module: nn.Module) -> Forward:
    """The forward of the module's class, bound to it."""
    return type(module).forward.__get__(module)


def is_plain(module: Any, *, below: bool = False) -> bool:
    """A module that is all there: no hooks, no wrapper around its forward."""
    return (
        isinstance(module, nn.Module)
        and not (module._forward_hooks or module._forward_pre_hooks)
        and "forward" not in vars(module)
        and (below or not list(module.children()))
    )


def is_map(module: Any) -> bool:
    """A linear map whose weight is a plain tensor, and nothing around it."""
    # torchao's layers are plain, and their weights are not.
    plain = type(module) is nn.Linear and type(module.weight) is nn.Parameter
    return plain and is_plain(module) and module.weight.is_contiguous()


def rows_of(x: torch.Tensor, weight: torch.Tensor, rows: int) -> torch.Tensor | None:
    """[rows, K] of one token of each row, or None for other inputs."""
    fits = x.ndim == 3 and x.shape[0] == rows and x.shape[1] == 1 and x.dtype == weight.dtype
    return x.reshape(rows, -1) if fits and not torch.is_grad_enabled() else None


def norm_of(module: Any):
    """A root-mean-square norm's weight and epsilon, or None where there are not just these."""
    from sparsek_kernels.triton.linears import Norm

    if not is_plain(module):
        return None
    weights, eps = list(module.parameters()), getattr(module, "variance_epsilon", None)
    eps = getattr(module, "eps", None) if eps is None else eps
    if len(weights) != 1 or weights[0].ndim != 1 or not isinstance(eps, float):
        return None
    return Norm(weights[0], eps)


def fused_norm(module: nn.Module, rows: int) -> Forward | None:
    """A root-mean-square norm of one token of each of `rows` rows."""
    from sparsek_kernels.triton import linears

    norm, own = norm_of(module), own_forward(module)
    if norm is None:
        return None

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        part = None if args or kwargs else rows_of(x, norm.weight, rows)
        if part is None or part.shape[1] != norm.weight.shape[0]:
            return own(x, *args, **kwargs)
        return linears.rms_norm(part, norm).view_as(x)

    return forward


def fused_rotary(module: nn.Module, rows: int) -> Forward | None:
    """Cosines and sines of rotary positions of one token of each of `rows` rows."""
    from sparsek_kernels.triton import linears

    frequencies = getattr(module, "inv_freq", None)
    scaling = getattr(module, "attention_scaling", None)
    if not (torch.is_tensor(frequencies) and isinstance(scaling, float) and is_plain(module)):
        return None
    if frequencies.ndim != 1 or frequencies.dtype != torch.float32:
        return None
    if getattr(module, "rope_type", None) not in _FIXED_FREQUENCIES:
        return None
    own = own_forward(module)

    def forward(x: torch.Tensor, position_ids: torch.Tensor, **kwargs: Any):
        if kwargs or position_ids.shape != (rows, 1) or torch.is_grad_enabled():
            return own(x, position_ids, **kwargs)
        turn = linears.rotary(position_ids[:, 0], module.inv_freq, scaling, x.dtype)
        return tuple(part[:, None] for part in turn)

    return forward


def fused_map(module: nn.Module, rows: int) -> Forward | None:
    """A linear map of one token of each of `rows` rows."""
    from sparsek_kernels.triton import linears

    if not is_map(module):
        return None
    own = own_forward(module)

    def forward(x: torch.Tensor) -> torch.Tensor:
        part = rows_of(x, module.weight, rows)
        if part is None:
            return own(x)
        return linears.linear(part, module.weight, module.bias)[:, None]

    return forward


def gated_parts(module: Any) -> tuple[nn.Linear, nn.Linear, nn.Linear] | None:
    """Gate, up and down of an MLP silu(gate) * up, or None for other modules."""
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if not all(map(is_map, parts)) or not is_plain(module, below=True):
        return None
    if not _is_silu(getattr(module, "act_fn", None)):
        return None
    return tuple(parts) if (parts[0].bias is None) == (parts[1].bias is None) else None


def _is_silu(activation: Any) -> bool:
    """By its values: near 0, where rows that are compared may lie, all such functions agree."""
    at = torch.linspace(-4, 4, 33)
    return callable(activation) and torch.allclose(activation(at), F.silu(at), atol=1e-6)


def fused_mlp(module: nn.Module, rows: int) -> Forward | None:
    """A gated MLP of one token of each of `rows` rows, in two launches."""
    from sparsek_kernels.triton import linears

    parts, own = gated_parts(module), own_forward(module)
    if parts is None:
        return None
    gate, up, down = parts

    def forward(x: torch.Tensor) -> torch.Tensor:
        part = rows_of(x, gate.weight, rows)
        if part is None:
            return own(x)
        inner = linears.gated(part, (gate.weight, gate.bias), (up.weight, up.bias))
        return linears.linear(inner, down.weight, down.bias)[:, None]

    return forward
