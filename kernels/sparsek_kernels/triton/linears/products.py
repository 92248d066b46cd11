"""Rows of a weight times a few rows of input: without tensor cores, and with them.

Weights are what takes the time, and no launch of a step writes them. So wherever a launch may begin
before the one before it has ended (WAITS), each way asks for its first weights and then waits.
"""

import triton
import triton.language as tl

from sparsek_kernels.triton.launches.overlap import LINE, to_cache
from sparsek_kernels.triton.linears.inputs import (
    inputs,
    norm_part,
    norm_scale,
    normalised,
    raw_inputs,
    rounded,
)

TOGETHER = tl.constexpr(8)  # products that a thread adds up before they join a sum


@triton.jit
def _weights(weight, rows, inside, start, K: tl.constexpr, BK: tl.constexpr):
    """Tile [BN, BK] of a weight [N, K]; 0 outside."""
    at = start + tl.arange(0, BK)
    where = weight + rows.to(tl.int64)[:, None] * K + at[None, :]
    mask = inside[:, None] & (at < K)[None, :]
    return tl.load(where, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def _to_cache(weight, rows, inside, start, K: tl.constexpr, COLUMNS: tl.constexpr):
    """Asks the L2 cache for columns [start, start + COLUMNS) of some rows of a weight."""
    STEP: tl.constexpr = LINE * 8 // weight.dtype.element_ty.primitive_bitwidth
    at = start + tl.arange(0, max(1, COLUMNS // STEP)) * STEP
    at = tl.where(at < K, at, 0)  # an address that is there
    row = tl.where(inside, rows, 0).to(tl.int64)
    to_cache(weight + row[:, None] * K + at[None, :])


@triton.jit
def _next_weights(
    low_weight, high_weight, low, high, low_in, high_in, start,
    K: tl.constexpr, BK: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """The two tiles from `start` on; those AHEAD columns before them go to the L2 cache."""
    a = _weights(low_weight, low, low_in, start, K, BK)
    b = _weights(high_weight, high, high_in, start, K, BK)
    if AHEAD > BK and AHEAD < K:
        later = start - BK + AHEAD
        if later < K:
            _to_cache(low_weight, low, low_in, later, K, BK)
            _to_cache(high_weight, high, high_in, later, K, BK)
    return a, b


@triton.jit
def _one_product(
    a, b, x, x_s, norm, eps, low_weight, high_weight, low, high, low_in, high_in,
    K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """[1, BN] each, of one row. Each next tile is asked for before the last one is used."""
    scale = norm_scale(x, x_s, eps, K, 1, 1, BK, NORM)
    low_parts = tl.zeros([BN, BK], tl.float32)
    high_parts = tl.zeros([BN, BK], tl.float32)
    for start in range(0, K, BK):
        part = inputs(x, x_s, scale, norm, start, K, 1, 1, BK, NORM)
        if BK < K:
            next_a = _weights(low_weight, low, low_in, start + BK, K, BK)
            next_b = _weights(high_weight, high, high_in, start + BK, K, BK)
        low_parts += a.to(tl.float32) * part
        high_parts += b.to(tl.float32) * part
        if BK < K:
            a, b = next_a, next_b
    return tl.sum(low_parts, 1)[None, :], tl.sum(high_parts, 1)[None, :]


@triton.jit
def _row(
    x, scale, norm, start, K: tl.constexpr, BK: tl.constexpr, W: tl.constexpr, NORM: tl.constexpr
):
    """Tile [W, BK] of a row of input, W times the same, as `inputs` makes it.

    Once for all of a warp's rows of weights: so that threads hold it as they hold those.
    """
    at = start + tl.zeros([W, 1], tl.int32) + tl.arange(0, BK)[None, :]
    part = tl.load(x + at, mask=at < K, other=0.0).to(tl.float32)
    if NORM:
        by = tl.load(norm + at, mask=at < K, other=0.0).to(tl.float32)
        part = rounded(rounded(part * scale, x) * by, x)
    return _wide(part, 1, W, BK)


@triton.jit
def _wide(tile, R: tl.constexpr, W: tl.constexpr, BK: tl.constexpr):
    """[R, W, BK / 8, 8] float32 of [R * W, BK]: a thread holds what the last axis sums up."""
    return tl.reshape(tile.to(tl.float32), [R, W, BK // TOGETHER, TOGETHER])


@triton.jit
def _scale_of(scale, m: tl.constexpr, BM: tl.constexpr):
    """One of [BM]."""
    return tl.sum(tl.where(tl.arange(0, BM) == m, scale, 0.0), 0)


@triton.jit
def _stacked(row_0, row_1, row_2, row_3, BM: tl.constexpr, BN: tl.constexpr):
    """[BM, BN] of four sums [R, W, ...]."""
    m = tl.arange(0, BM)[:, None]
    row_0, row_1 = tl.reshape(tl.sum(row_0, 2), [1, BN]), tl.reshape(tl.sum(row_1, 2), [1, BN])
    row_2, row_3 = tl.reshape(tl.sum(row_2, 2), [1, BN]), tl.reshape(tl.sum(row_3, 2), [1, BN])
    return tl.where(m < 2, tl.where(m == 0, row_0, row_1), tl.where(m == 2, row_2, row_3))


@triton.jit
def _few_products(
    a, b, x, x_s, norm, eps, low_weight, high_weight, low, high, low_in, high_in,
    K: tl.constexpr, M: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BX: tl.constexpr, W: tl.constexpr, NORM: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """[BM, BN] each, of two to four rows: a tile of weights is loaded once for all of them.

    W: how many rows of a weight the warps stand beside; each warp takes BN / W, one after another.
    """
    R: tl.constexpr = BN // W
    scale = norm_scale(x, x_s, eps, K, M, BM, BX, NORM)
    scale_0, scale_1 = _scale_of(scale, 0, BM), _scale_of(scale, 1, BM)
    scale_2, scale_3 = _scale_of(scale, 2, BM), _scale_of(scale, 3, BM)
    nothing = tl.zeros([R, W, BK // TOGETHER], tl.float32)
    low_0, low_1, low_2, low_3 = nothing, nothing, nothing, nothing
    high_0, high_1, high_2, high_3 = nothing, nothing, nothing, nothing
    for start in range(0, K, BK):
        if BK < K:
            next_a, next_b = _next_weights(
                low_weight, high_weight, low, high, low_in, high_in, start + BK, K, BK, AHEAD
            )
        wide_a, wide_b = _wide(a, R, W, BK), _wide(b, R, W, BK)
        part = _row(x, scale_0, norm, start, K, BK, W, NORM)
        low_0 += tl.sum(wide_a * part, 3)
        high_0 += tl.sum(wide_b * part, 3)
        part = _row(x + x_s, scale_1, norm, start, K, BK, W, NORM)
        low_1 += tl.sum(wide_a * part, 3)
        high_1 += tl.sum(wide_b * part, 3)
        if M > 2:
            part = _row(x + 2 * x_s, scale_2, norm, start, K, BK, W, NORM)
            low_2 += tl.sum(wide_a * part, 3)
            high_2 += tl.sum(wide_b * part, 3)
        if M > 3:
            part = _row(x + 3 * x_s, scale_3, norm, start, K, BK, W, NORM)
            low_3 += tl.sum(wide_a * part, 3)
            high_3 += tl.sum(wide_b * part, 3)
        if BK < K:
            a, b = next_a, next_b
    low_sums = _stacked(low_0, low_1, low_2, low_3, BM, BN)
    return low_sums, _stacked(high_0, high_1, high_2, high_3, BM, BN)


@triton.jit
def _many_products(
    held_a, held_b, x, x_s, norm, eps, low_weight, high_weight, low, high, low_in, high_in,
    K: tl.constexpr, M: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BX: tl.constexpr, NORM: tl.constexpr, STAGES: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """[BM, BN] each, by tensor cores; weights pass through shared memory, STAGES tiles ahead.

    HELD: the first tiles are in registers already; they are multiplied last.
    """
    scale = norm_scale(x, x_s, eps, K, M, BM, BX, NORM)
    low_sum = tl.zeros([BM, BN], tl.float32)
    high_sum = tl.zeros([BM, BN], tl.float32)
    for start in tl.range(BK if HELD else 0, K, BK, num_stages=STAGES):
        a = _weights(low_weight, low, low_in, start, K, BK)
        b = _weights(high_weight, high, high_in, start, K, BK)
        part = inputs(x, x_s, scale, norm, start, K, M, BM, BK, NORM).to(a.dtype)
        low_sum = tl.dot(part, tl.trans(a), low_sum, input_precision="ieee")
        high_sum = tl.dot(part, tl.trans(b), high_sum, input_precision="ieee")
    if HELD:
        part = inputs(x, x_s, scale, norm, 0, K, M, BM, BK, NORM).to(held_a.dtype)
        low_sum = tl.dot(part, tl.trans(held_a), low_sum, input_precision="ieee")
        high_sum = tl.dot(part, tl.trans(held_b), high_sum, input_precision="ieee")
    return low_sum, high_sum


@triton.jit
def _split(tile, ROWS: tl.constexpr, BK: tl.constexpr, W: tl.constexpr):
    """[W, ROWS, BK / W] of [ROWS, BK]."""
    return tl.permute(tl.reshape(tile, [ROWS, W, BK // W]), [1, 0, 2])


@triton.jit
def _early_products(
    a, b, x, x_s, norm, eps, low_weight, high_weight, low, high, low_in, high_in,
    K: tl.constexpr, M: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BX: tl.constexpr, W: tl.constexpr, NORM: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """The same with one tile ahead, in registers: the first is under way before the wait.

    Each of the W warps multiplies other columns of the tile.
    """
    part = raw_inputs(x, x_s, 0, K, M, BM, BK)
    if NORM:
        by = norm_part(norm, 0, K, BK)
    scale = norm_scale(x, x_s, eps, K, M, BM, BX, NORM)
    low_sum = tl.zeros([W, BN, BM], tl.float32)
    high_sum = tl.zeros([W, BN, BM], tl.float32)
    for start in range(0, K, BK):
        if BK < K:
            next_a, next_b = _next_weights(
                low_weight, high_weight, low, high, low_in, high_in, start + BK, K, BK, AHEAD
            )
            next_part = raw_inputs(x, x_s, start + BK, K, M, BM, BK)
            if NORM:
                next_by = norm_part(norm, start + BK, K, BK)
        if NORM:
            part = normalised(part, scale, by, x).to(a.dtype)
        split = tl.permute(_split(part, BM, BK, W), [0, 2, 1])
        low_sum = tl.dot(_split(a, BN, BK, W), split, low_sum, input_precision="ieee")
        high_sum = tl.dot(_split(b, BN, BK, W), split, high_sum, input_precision="ieee")
        if BK < K:
            a, b, part = next_a, next_b, next_part
            if NORM:
                by = next_by
    return tl.trans(tl.sum(low_sum, 0)), tl.trans(tl.sum(high_sum, 0))


@triton.jit
def first_weights(
    low_weight, high_weight, low, high, low_in, high_in, K: tl.constexpr, BK: tl.constexpr,
    DOT: tl.constexpr, EARLY: tl.constexpr, AHEAD: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """The first two tiles, where a way takes them; AHEAD columns are on their way to the cache."""
    a, b = 0.0, 0.0
    if EARLY or HELD or not DOT:
        a = _weights(low_weight, low, low_in, 0, K, BK)
        b = _weights(high_weight, high, high_in, 0, K, BK)
    if AHEAD:
        _to_cache(low_weight, low, low_in, 0, K, AHEAD)
        _to_cache(high_weight, high, high_in, 0, K, AHEAD)
    return a, b


@triton.jit
def products(
    a, b, x, x_s, norm, eps, low_weight, high_weight, low, high, low_in, high_in,
    K: tl.constexpr, M: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BX: tl.constexpr, NORM: tl.constexpr, BESIDE: tl.constexpr, DOT: tl.constexpr,
    EARLY: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """Two tiles [BM, BN] float32: the rows `low` of one weight and `high` of another times x."""
    if EARLY:
        low_sum, high_sum = _early_products(
            a, b, x, x_s, norm, eps, low_weight, high_weight, low, high, low_in, high_in,
            K, M, BM, BN, BK, BX, BESIDE, NORM, AHEAD,
        )  # fmt: skip
    elif DOT:
        low_sum, high_sum = _many_products(
            a, b, x, x_s, norm, eps, low_weight, high_weight, low, high, low_in, high_in,
            K, M, BM, BN, BK, BX, NORM, STAGES, HELD,
        )  # fmt: skip
    elif M > 1:
        low_sum, high_sum = _few_products(
            a, b, x, x_s, norm, eps, low_weight, high_weight, low, high, low_in, high_in,
            K, M, BM, BN, BK, BX, BESIDE, NORM, AHEAD,
        )  # fmt: skip
    else:
        low_sum, high_sum = _one_product(
            a, b, x, x_s, norm, eps, low_weight, high_weight, low, high, low_in, high_in,
            K, BN, BK, NORM,
        )  # fmt: skip
    return low_sum, high_sum
