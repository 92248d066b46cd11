"""What packed weights are, as numbers: asked of their module, which alone can read them."""

from __future__ import annotations

import torch
from torch import nn


def weight_of(linear: nn.Module, inputs: int, like: torch.Tensor) -> torch.Tensor:
    """[inputs, outputs] float32, what a packed layer makes of each unit vector.

    Args:
        like: a tensor of the layer's dtype and device.
    """
    unit = torch.eye(inputs, dtype=like.dtype, device=like.device)
    return (linear(unit) - linear(torch.zeros_like(unit[:1]))).float()
