"""Keys and values in 8 bits: int8 codes, and one float32 scale for each slot's row of D numbers.

Symmetric around 0, so that a row of zeros needs no code of its own. Rows are quantised once, when
they enter the state, and stay as they are until they are evicted: nothing drifts.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 127  # of a code; -128 is not used
# A scale is the largest number times this. Not divided by LARGEST: PyTorch multiplies by a number's
# inverse on CUDA devices and divides on others, and everybody should get the same scale.
STEP = 1 / LARGEST
LEAST_SCALE = 2.0**-126  # the smallest normal float32: a row of zeros divides by it


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of rows.

    Args:
        x: [..., D], floating.

    Returns:
        int8 [..., D] and float32 [...]; x is about codes * scale, each number to within
        scale / 2.
    """
    x = x.to(torch.float32)
    scale = (x.abs().amax(-1) * STEP).clamp(min=LEAST_SCALE)
    codes = torch.floor(x / scale[..., None] + 0.5)
    return codes.to(torch.int8), scale


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., D] in `dtype`, the inverse of `quantize`."""
    return (codes.to(torch.float32) * scale[..., None]).to(dtype)
