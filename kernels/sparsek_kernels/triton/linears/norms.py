"""Norms by themselves: of rows, and of heads before their rotary positions."""

import triton
import triton.language as tl

from sparsek_kernels.triton.linears.inputs import inputs, norm_scale, rounded


@triton.jit
def normalise(
    x, norm, out, x_s, eps, K: tl.constexpr, BK: tl.constexpr, WAITS: tl.constexpr
):  # fmt: skip
    """A root-mean-square norm of one row."""
    if WAITS:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0)
    scale = norm_scale(x + row * x_s, x_s, eps, K, 1, 1, BK, True)
    for start in range(0, K, BK):
        at = start + tl.arange(0, BK)
        y = inputs(x + row * x_s, x_s, scale, norm, start, K, 1, 1, BK, True)
        tl.store(out + row * K + at[None, :], y.to(out.dtype.element_ty), mask=(at < K)[None, :])


@triton.jit
def turn_heads(
    q, k, q_norm, k_norm, cos, sin, q_heads, k_heads, cos_s, eps, D: tl.constexpr,
    HALF: tl.constexpr, WAITS: tl.constexpr,
):  # fmt: skip
    """One head of one row, in place: a norm over its numbers, then its rotary position."""
    if WAITS:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row, head = tl.program_id(0), tl.program_id(1)
    place, by = q + (row * q_heads + head) * D, q_norm
    if head >= q_heads:
        place, by = k + (row * k_heads + head - q_heads) * D, k_norm
    lane = tl.arange(0, HALF)
    mask = lane < D // 2
    low = tl.load(place + lane, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(place + D // 2 + lane, mask=mask, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(low * low + high * high, 0) / D + eps)
    low_by = tl.load(by + lane, mask=mask, other=0.0).to(tl.float32)
    high_by = tl.load(by + D // 2 + lane, mask=mask, other=0.0).to(tl.float32)
    low = rounded(rounded(low * scale, q) * low_by, q)
    high = rounded(rounded(high * scale, q) * high_by, q)
    at = row * cos_s + lane
    low_cos = tl.load(cos + at, mask=mask, other=0.0).to(tl.float32)
    high_cos = tl.load(cos + D // 2 + at, mask=mask, other=0.0).to(tl.float32)
    low_sin = tl.load(sin + at, mask=mask, other=0.0).to(tl.float32)
    high_sin = tl.load(sin + D // 2 + at, mask=mask, other=0.0).to(tl.float32)
    turned = rounded(low * low_cos, q) - rounded(high * low_sin, q)
    other = rounded(high * high_cos, q) + rounded(low * high_sin, q)
    tl.store(place + lane, turned.to(q.dtype.element_ty), mask=mask)
    tl.store(place + D // 2 + lane, other.to(q.dtype.element_ty), mask=mask)
