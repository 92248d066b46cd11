"""Whether a replacement computes, on random rows, what its module does."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sparsek_cli.models.cache.slots import SparseKCache
from sparsek_cli.models.generation.fused.parts import Forward, own_forward

# Relative error of what the kernels give; a module that computes something else is far beyond it.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
# Rows are small, so that what a layer adds to them is not hidden by them.
_SPREAD = 0.05
_STEPS = 3  # that a layer is compared over: the first attends to itself alone


def _near(found: Any, expected: Any) -> bool:
    if not torch.is_tensor(expected) or found.shape != expected.shape:
        return False
    if found.dtype != expected.dtype:
        return False
    found, wanted = found.float(), expected.float()
    error = float((found - wanted).norm() / wanted.norm())
    return error < TOLERANCE[expected.dtype]


def _draws(model: nn.Module, width: int, rows: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    made = _SPREAD * torch.randn(rows, 1, width, generator=generator)
    return made.to(model.device, model.dtype)


def same_module(model: nn.Module, module: nn.Module, forward: Forward, rows: int) -> bool:
    """Whether a module without a state computes on random rows what its replacement does."""
    weights = list(module.parameters())
    if any(weight.dtype != model.dtype for weight in weights):
        return False
    x = _draws(model, weights[0].shape[-1], rows, 0)
    return _near(forward(x), own_forward(module)(x))


def same_rotary(model: nn.Module, module: nn.Module, forward: Forward, rows: int) -> bool:
    """The same for rotary positions, near and far."""
    x = torch.zeros(rows, 1, 1, device=model.device, dtype=model.dtype)
    for place in (1, 1000, 1_000_000):
        positions = place + 7 * torch.arange(rows, device=model.device)[:, None]
        found, wanted = (call(x, positions) for call in (forward, own_forward(module)))
        if not isinstance(wanted, tuple) or len(wanted) != 2:
            return False
        if not all(_near(*pair) for pair in zip(found, wanted, strict=True)):
            return False
    return True


def same_layer(model: nn.Module, module: Any, forward: Forward, rows: int) -> bool:
    """The same for a layer, over several tokens, with what both leave in the cache."""
    rotary = getattr(model.base_model, "rotary_emb", None)
    scorers = {id(weight) for weight in module.self_attn.scorer.parameters()}
    others = (weight for weight in module.parameters() if id(weight) not in scorers)
    if rotary is None or any(weight.dtype != model.dtype for weight in others):
        return False
    width, index = module.input_layernorm.weight.shape[0], module.self_attn.layer_idx
    caches = [SparseKCache(model.config) for _ in range(2)]
    places = torch.arange(rows, device=model.device)[:, None] * 5  # rows stand at several
    for step in range(_STEPS):
        x = _draws(model, width, rows, step)
        positions = places + step
        turn = rotary(x, position_ids=positions)
        if not isinstance(turn, tuple):
            return False
        given = {"position_ids": positions, "use_cache": True, "position_embeddings": turn}
        outs = [
            call(x, attention_mask=None, past_key_values=cache, **given)
            for call, cache in zip((forward, own_forward(module)), caches, strict=True)
        ]
        if not _near(*outs):
            return False
    found, wanted = (cache.layers[index].state.scores for cache in caches)
    held = wanted.isfinite()
    return torch.equal(held, found.isfinite()) and bool(
        ((found - wanted).abs() <= TOLERANCE[model.dtype] * (1 + wanted.abs()))[held].all()
    )
