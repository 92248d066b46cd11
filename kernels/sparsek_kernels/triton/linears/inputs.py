"""The rows that are multiplied, and the root-mean-square norm before them."""

import triton
import triton.language as tl


@triton.jit
def rounded(x, like):
    """x as if it had been stored in the type that `like` points to; float32."""
    return x.to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def raw_inputs(x, x_s, start, K: tl.constexpr, M: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
    """Tile [BM, BK] of the input as it is; 0 outside."""
    row = tl.arange(0, BM)
    at = start + tl.arange(0, BK)
    mask = (row < M)[:, None] & (at < K)[None, :]
    return tl.load(x + row[:, None] * x_s + at[None, :], mask=mask, other=0.0)


@triton.jit
def norm_part(norm, start, K: tl.constexpr, BK: tl.constexpr):
    """[BK] of a norm's weight; 0 outside."""
    at = start + tl.arange(0, BK)
    return tl.load(norm + at, mask=at < K, other=0.0)


@triton.jit
def normalised(part, scale, by, like):
    """[BM, BK] float32, rounded as `like` is, of raw inputs, their scales [BM] and weights [BK]."""
    wide = part.to(tl.float32) * scale[:, None]
    return rounded(rounded(wide, like) * by.to(tl.float32)[None, :], like)


@triton.jit
def inputs(
    x, x_s, scale, norm, start, K: tl.constexpr, M: tl.constexpr, BM: tl.constexpr,
    BK: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Tile [BM, BK] of the input, normalised if there is a norm; float32, rounded as x is."""
    part = raw_inputs(x, x_s, start, K, M, BM, BK)
    if NORM:
        return normalised(part, scale, norm_part(norm, start, K, BK), x)
    else:
        return part.to(tl.float32)


@triton.jit
def norm_scale(
    x, x_s, eps, K: tl.constexpr, M: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """1 / root mean square of each row [BM]."""
    scale = tl.full([BM], 1.0, tl.float32)
    if NORM:
        squares = tl.zeros([BM, BK], tl.float32)
        for start in range(0, K, BK):
            part = raw_inputs(x, x_s, start, K, M, BM, BK).to(tl.float32)
            squares += part * part
        scale = 1.0 / tl.sqrt(tl.sum(squares, 1) / K + eps)
    return scale
