"""float32 weights as sums of bf16 numbers, which tensor cores multiply exactly."""

import torch
import triton
import triton.language as tl

from sparsek_kernels.triton.launches.launch import launch

PARTS = 3  # of 8 bits each: all 24 of a float32
_PARTS = tl.constexpr(PARTS)
_BLOCK = 1024


@triton.jit
def _cut_in_parts(x, parts, numbers, BLOCK: tl.constexpr):
    """Each part is what the ones before it leave, rounded."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rest = tl.load(x + at, mask=at < numbers, other=0.0)
    for part in tl.static_range(_PARTS):
        rounded = rest.to(tl.bfloat16)
        tl.store(parts + part * numbers + at, rounded, mask=at < numbers)
        rest -= rounded.to(tl.float32)


def bf16_parts(x: torch.Tensor) -> torch.Tensor:
    """bf16 [3 G, C], whose three blocks of rows add up to float32 x [G, C], in one launch."""
    x = x.contiguous()
    parts = torch.empty(PARTS * x.shape[0], x.shape[1], dtype=torch.bfloat16, device=x.device)
    numbers = x.numel()
    grid = (triton.cdiv(numbers, _BLOCK),)
    launch(_cut_in_parts, grid, x, parts, numbers, BLOCK=_BLOCK, num_warps=4)
    return parts
