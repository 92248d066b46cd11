"""One map's outputs: products, and what stands after them."""

import triton
import triton.language as tl

from sparsek_kernels.triton.linears.inputs import rounded
from sparsek_kernels.triton.linears.products import first_weights, products

PLAIN, GATED, ROTARY = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _biased(sums, bias, rows, inside, like, BIASED: tl.constexpr):
    """What torch's linear map gives: the sum with its bias, rounded once."""
    if BIASED:
        sums += tl.load(bias + rows, mask=inside, other=0.0).to(tl.float32)[None, :]
    return rounded(sums, like)


@triton.jit
def segment(
    tile, x, x_s, norm, eps, low_weight, high_weight, low_bias, high_bias, out, residual,
    cos, sin, cos_s, n, turns,
    K: tl.constexpr, M: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    KIND: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, BIASED: tl.constexpr,
    RESIDUAL: tl.constexpr, BX: tl.constexpr, BESIDE: tl.constexpr, DOT: tl.constexpr,
    EARLY: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr, HELD: tl.constexpr,
    WAITS: tl.constexpr,
):  # fmt: skip
    """Outputs of one map: `BN` pairs of them, of n outputs (n pairs where it is gated).

    turns: whether rotary positions turn the pairs, where they are those of such positions.
    """
    pair = tile * BN + tl.arange(0, BN)
    if KIND == GATED:
        low, high = pair, pair
        low_in, high_in = pair < n, pair < n
    elif KIND == ROTARY:
        low = pair // HALF * (2 * HALF) + pair % HALF
        high = low + HALF
        low_in, high_in = low < n, high < n
    else:
        half = (n + 1) // 2
        low, high = pair, pair + half
        low_in, high_in = pair < half, (pair < half) & (high < n)
    a, b = first_weights(
        low_weight, high_weight, low, high, low_in, high_in, K, BK, DOT, EARLY, AHEAD, HELD
    )
    if WAITS:
        tl.extra.cuda.gdc_wait()
    m = tl.arange(0, BM)[:, None]
    low_mask, high_mask = (m < M) & low_in[None, :], (m < M) & high_in[None, :]
    if RESIDUAL:
        low_more = tl.load(residual + m * n + low[None, :], mask=low_mask)
        high_more = tl.load(residual + m * n + high[None, :], mask=high_mask)
    low_sum, high_sum = products(
        a, b, x, x_s, norm, eps, low_weight, high_weight, low, high, low_in, high_in,
        K, M, BM, BN, BK, BX, NORM, BESIDE, DOT, EARLY, STAGES, AHEAD, HELD,
    )  # fmt: skip
    low_y = _biased(low_sum, low_bias, low, low_in, x, BIASED)
    high_y = _biased(high_sum, high_bias, high, high_in, x, BIASED)
    if KIND == GATED:
        active = rounded(low_y * (1.0 / (1.0 + tl.exp(-low_y))), x)
        y = (active * high_y).to(out.dtype.element_ty)
        tl.store(out + m * n + low[None, :], y, mask=low_mask)
    else:
        if KIND == ROTARY:
            at = cos + m * cos_s + (pair % HALF)[None, :]
            low_cos = tl.load(at, mask=low_mask, other=0.0).to(tl.float32)
            high_cos = tl.load(at + HALF, mask=low_mask, other=0.0).to(tl.float32)
            at = sin + m * cos_s + (pair % HALF)[None, :]
            low_sin = tl.load(at, mask=low_mask, other=0.0).to(tl.float32)
            high_sin = tl.load(at + HALF, mask=low_mask, other=0.0).to(tl.float32)
            turned = rounded(low_y * low_cos, x) - rounded(high_y * low_sin, x)
            other = rounded(high_y * high_cos, x) + rounded(low_y * high_sin, x)
            low_y, high_y = tl.where(turns, turned, low_y), tl.where(turns, other, high_y)
        if RESIDUAL:
            low_y += low_more.to(tl.float32)
            high_y += high_more.to(tl.float32)
        tl.store(out + m * n + low[None, :], low_y.to(out.dtype.element_ty), mask=low_mask)
        tl.store(out + m * n + high[None, :], high_y.to(out.dtype.element_ty), mask=high_mask)
