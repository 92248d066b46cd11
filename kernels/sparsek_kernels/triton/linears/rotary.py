"""Cosines and sines of rotary positions: what takes torch some nine launches of every step."""

import torch
import triton
import triton.language as tl

from sparsek_kernels.triton.launches.launch import launch
from sparsek_kernels.triton.launches.overlap import may_overlap

_TURN = tl.constexpr(0.15915494309189535)  # 1 / (2 pi)
_CIRCLE = tl.constexpr(6.283185307179586)


@triton.jit
def _cosine_and_sine(x):
    """Of float64 within half a turn of 0: the series, far beyond float32's precision."""
    square = x * x
    cosine, sine = 1.0, 1.0
    for i in tl.static_range(12):
        k = 2 * (12 - i)
        cosine = 1.0 - square * (1.0 / (k * (k - 1))) * cosine
        sine = 1.0 - square * (1.0 / (k * (k + 1))) * sine
    return cosine, sine * x


@triton.jit
def turns(
    positions, frequencies, cos, sin, positions_s, half, scaling, HALF: tl.constexpr,
    BEGINS: tl.constexpr,
):  # fmt: skip
    """Cosines and sines [2 * half] of one row's angles [half], twice each."""
    if BEGINS:  # it begins late itself, so that whoever follows may begin early
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0)
    lane = tl.arange(0, HALF)
    mask = lane < half
    frequency = tl.load(frequencies + lane, mask=mask, other=0.0)
    angle = tl.load(positions + row * positions_s).to(tl.float32) * frequency  # rounded, as torch's
    angle = angle.to(tl.float64)
    angle -= tl.floor(angle * _TURN + 0.5) * _CIRCLE
    cosine, sine = _cosine_and_sine(angle)
    cosine = (cosine.to(tl.float32) * scaling).to(cos.dtype.element_ty)
    sine = (sine.to(tl.float32) * scaling).to(sin.dtype.element_ty)
    at = row * 2 * half + lane
    tl.store(cos + at, cosine, mask=mask)
    tl.store(cos + at + half, cosine, mask=mask)
    tl.store(sin + at, sine, mask=mask)
    tl.store(sin + at + half, sine, mask=mask)


def rotary(
    positions: torch.Tensor, frequencies: torch.Tensor, scaling: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of rotary positions, times `scaling`.

    Args:
        positions: [B] int64. frequencies: [half] float32, radians per position.

    Returns:
        Two of [B, 2 * half], of `dtype`: those of all angles, twice.
    """
    rows, half = positions.shape[0], frequencies.shape[0]
    cos, sin = torch.empty(2, rows, 2 * half, dtype=dtype, device=positions.device)
    launch(
        turns, (rows,),
        positions, frequencies, cos, sin, positions.stride(0), half, scaling,
        HALF=triton.next_power_of_2(half), BEGINS=may_overlap(positions.device), num_warps=1,
    )  # fmt: skip
    return cos, sin
