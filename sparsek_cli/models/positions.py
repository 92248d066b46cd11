"""Rotary positions of a model that stand once for all texts; see families/varying_positions.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from sparsek_cli.families.varying_positions import DYNAMIC, LONGROPE

# By transformers' kinds, whose modules choose anew in every pass, our own, which it leaves alone.
FIXED = {LONGROPE: "fixed_longrope", DYNAMIC: "fixed_ntk"}


def _by_length(kind: str) -> Callable[..., tuple[torch.Tensor, float]]:
    compute = ROPE_INIT_FUNCTIONS[kind]

    def frequencies(
        config: Any, device: Any = None, seq_len: int | None = None, layer_type: str | None = None
    ) -> tuple[torch.Tensor, float]:
        tokens = seq_len or config.max_position_embeddings
        return compute(config, device, seq_len=tokens, layer_type=layer_type)

    return frequencies


# transformers fills the buffers of a loaded model by these.
ROPE_INIT_FUNCTIONS.update({name: _by_length(kind) for kind, name in FIXED.items()})


def fix_positions(model: nn.Module) -> None:
    """Has the model choose by its own length, once, where it would by each text's."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, str):
            module.rope_type = FIXED.get(kinds, kinds)
        elif isinstance(kinds, dict):
            module.rope_type = {layers: FIXED.get(kind, kind) for layers, kind in kinds.items()}
    _turn(model, None)


@contextmanager
def positions_for(model: nn.Module, tokens: int) -> Iterator[None]:
    """Within the block, positions are those that transformers has for a text of `tokens`.

    Args:
        model: one that `fix_positions` has seen, which converted models all have.
    """
    _turn(model, tokens)
    try:
        yield
    finally:
        _turn(model, None)


@torch.no_grad()
def _turn(model: nn.Module, tokens: int | None) -> None:
    """Sets the frequencies to those for `tokens`, None: for the model's own length."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        by_type = kinds if isinstance(kinds, dict) else {None: kinds}
        for layers, kind in by_type.items():
            if kind not in FIXED.values():
                continue
            prefix = f"{layers}_" if layers else ""
            for name in ("inv_freq", "original_inv_freq"):
                buffer = getattr(module, prefix + name)
                found, _ = ROPE_INIT_FUNCTIONS[kind](
                    module.config, buffer.device, seq_len=tokens, layer_type=layers
                )
                buffer.copy_(found)
