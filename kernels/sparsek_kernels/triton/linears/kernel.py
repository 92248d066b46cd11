"""Programs that multiply a few rows by some rows of a weight, with what stands before and after.

At one to sixteen rows a linear map costs what reading its weight costs. So a program takes few
outputs and all of the input: many programs, no partial sums between them, always the same result.
Outputs come in pairs (a low and a high one), which is what rotary positions (two halves of a head)
and gated MLPs (gate and up) need, and costs a plain map nothing.
What torch's own modules round, is rounded here: a norm's output, a product, a sum with a residual.
"""

import triton
import triton.language as tl

PLAIN, GATED, ROTARY = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _rounded(x, like):
    """x as if it had been stored in the type that `like` points to; float32."""
    return x.to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def _weights(weight, rows, inside, start, K: tl.constexpr, BK: tl.constexpr):
    """Tile [BN, BK] of a weight [N, K]; 0 outside."""
    at = start + tl.arange(0, BK)
    where = weight + rows.to(tl.int64)[:, None] * K + at[None, :]
    mask = inside[:, None] & (at < K)[None, :]
    return tl.load(where, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def _inputs(
    x, x_s, scale, norm, start, K: tl.constexpr, M: tl.constexpr, BM: tl.constexpr,
    BK: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Tile [BM, BK] of the input, normalised if there is a norm; float32, rounded as x is."""
    row = tl.arange(0, BM)
    at = start + tl.arange(0, BK)
    mask = (row < M)[:, None] & (at < K)[None, :]
    part = tl.load(x + row[:, None] * x_s + at[None, :], mask=mask, other=0.0).to(tl.float32)
    if NORM:
        by = tl.load(norm + at, mask=at < K, other=0.0).to(tl.float32)
        part = _rounded(_rounded(part * scale[:, None], x) * by[None, :], x)
    return part


@triton.jit
def _norm_scale(
    x, x_s, eps, K: tl.constexpr, M: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """1 / root mean square of each row [BM]."""
    scale = tl.full([BM], 1.0, tl.float32)
    if NORM:
        squares = tl.zeros([BM, BK], tl.float32)
        for start in range(0, K, BK):
            part = _inputs(x, x_s, scale, x, start, K, M, BM, BK, False)
            squares += part * part
        scale = 1.0 / tl.sqrt(tl.sum(squares, 1) / K + eps)
    return scale


@triton.jit
def _many_products(
    x, x_s, norm, eps, low_weight, high_weight, low, high, low_in, high_in,
    K: tl.constexpr, M: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    NORM: tl.constexpr, STAGES: tl.constexpr, WAITS: tl.constexpr,
):  # fmt: skip
    """Two tiles [BM, BN] float32: the rows `low` of one weight and `high` of another times x."""
    if WAITS:
        tl.extra.cuda.gdc_wait()
    scale = _norm_scale(x, x_s, eps, K, M, BM, BK, NORM)
    low_sum = tl.zeros([BM, BN], tl.float32)
    high_sum = tl.zeros([BM, BN], tl.float32)
    for start in tl.range(0, K, BK, num_stages=STAGES):
        a = _weights(low_weight, low, low_in, start, K, BK)
        b = _weights(high_weight, high, high_in, start, K, BK)
        part = _inputs(x, x_s, scale, norm, start, K, M, BM, BK, NORM).to(a.dtype)
        low_sum = tl.dot(part, tl.trans(a), low_sum, input_precision="ieee")
        high_sum = tl.dot(part, tl.trans(b), high_sum, input_precision="ieee")
    return low_sum, high_sum


@triton.jit
def _one_product(
    x, x_s, norm, eps, low_weight, high_weight, low, high, low_in, high_in,
    K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr, WAITS: tl.constexpr,
):  # fmt: skip
    """The same for one row, without tensor cores: [1, BN] each.

    The first tiles are asked for before anything waits for the launch before this one, which
    writes no weights; each next one before the last is used.
    """
    a = _weights(low_weight, low, low_in, 0, K, BK)
    b = _weights(high_weight, high, high_in, 0, K, BK)
    if WAITS:
        tl.extra.cuda.gdc_wait()
    scale = _norm_scale(x, x_s, eps, K, 1, 1, BK, NORM)
    low_parts = tl.zeros([BN, BK], tl.float32)
    high_parts = tl.zeros([BN, BK], tl.float32)
    for start in range(0, K, BK):
        part = _inputs(x, x_s, scale, norm, start, K, 1, 1, BK, NORM)
        if BK < K:
            next_a = _weights(low_weight, low, low_in, start + BK, K, BK)
            next_b = _weights(high_weight, high, high_in, start + BK, K, BK)
        low_parts += a.to(tl.float32) * part
        high_parts += b.to(tl.float32) * part
        if BK < K:
            a, b = next_a, next_b
    return tl.sum(low_parts, 1)[None, :], tl.sum(high_parts, 1)[None, :]


@triton.jit
def _biased(sums, bias, rows, inside, like, BIASED: tl.constexpr):
    """What torch's linear map gives: the sum with its bias, rounded once."""
    if BIASED:
        sums += tl.load(bias + rows, mask=inside, other=0.0).to(tl.float32)[None, :]
    return _rounded(sums, like)


@triton.jit
def _segment(
    tile, x, x_s, norm, eps, low_weight, high_weight, low_bias, high_bias, out, residual,
    cos, sin, cos_s, n,
    K: tl.constexpr, M: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    KIND: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, BIASED: tl.constexpr,
    RESIDUAL: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr, WAITS: tl.constexpr,
):  # fmt: skip
    """Outputs of one map: `BN` pairs of them, of n outputs (n pairs where it is gated)."""
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
    if DOT:
        low_sum, high_sum = _many_products(
            x, x_s, norm, eps, low_weight, high_weight, low, high, low_in, high_in,
            K, M, BM, BN, BK, NORM, STAGES, WAITS,
        )  # fmt: skip
    else:
        low_sum, high_sum = _one_product(
            x, x_s, norm, eps, low_weight, high_weight, low, high, low_in, high_in,
            K, BN, BK, NORM, WAITS,
        )  # fmt: skip
    low_y = _biased(low_sum, low_bias, low, low_in, x, BIASED)
    high_y = _biased(high_sum, high_bias, high, high_in, x, BIASED)
    m = tl.arange(0, BM)[:, None]
    if KIND == GATED:
        active = _rounded(low_y * (1.0 / (1.0 + tl.exp(-low_y))), x)
        mask = (m < M) & low_in[None, :]
        tl.store(out + m * n + low[None, :], (active * high_y).to(out.dtype.element_ty), mask=mask)
    else:
        low_mask, high_mask = (m < M) & low_in[None, :], (m < M) & high_in[None, :]
        if KIND == ROTARY:
            at = cos + m * cos_s + (pair % HALF)[None, :]
            low_cos = tl.load(at, mask=low_mask, other=0.0).to(tl.float32)
            high_cos = tl.load(at + HALF, mask=low_mask, other=0.0).to(tl.float32)
            at = sin + m * cos_s + (pair % HALF)[None, :]
            low_sin = tl.load(at, mask=low_mask, other=0.0).to(tl.float32)
            high_sin = tl.load(at + HALF, mask=low_mask, other=0.0).to(tl.float32)
            turned = _rounded(low_y * low_cos, x) - _rounded(high_y * low_sin, x)
            high_y = _rounded(high_y * high_cos, x) + _rounded(low_y * high_sin, x)
            low_y = turned
        if RESIDUAL:
            low_y += tl.load(residual + m * n + low[None, :], mask=low_mask).to(tl.float32)
            high_y += tl.load(residual + m * n + high[None, :], mask=high_mask).to(tl.float32)
        tl.store(out + m * n + low[None, :], low_y.to(out.dtype.element_ty), mask=low_mask)
        tl.store(out + m * n + high[None, :], high_y.to(out.dtype.element_ty), mask=high_mask)


@triton.jit
def _score(
    head, x, x_s, norm, eps, weight, bias, scores, heads, hidden_weight, hidden_bias, hidden, width,
    K: tl.constexpr, M: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr,
    DEEP: tl.constexpr, WAITS: tl.constexpr,
):  # fmt: skip
    """The scores [M] of one KV head, in float32 throughout; the weight's rows are float32.

    Beyond the heads stand the numbers that an MLP scorer has inside.
    """
    if WAITS:
        tl.extra.cuda.gdc_wait()
    row, place, count = weight + head * K, bias + head, heads
    out, at_out = scores, head
    if DEEP:  # noqa: SIM102  (a constant of the kernel, the next one is not)
        if head >= heads:
            at_out = head - heads
            row, place, count = hidden_weight + at_out * K, hidden_bias + at_out, width
            out = hidden
    scale = _norm_scale(x, x_s, eps, K, M, BM, BK, NORM)
    sums = tl.zeros([BM, BK], tl.float32)
    for start in range(0, K, BK):
        at = start + tl.arange(0, BK)
        by = tl.load(row + at, mask=at < K, other=0.0)
        sums += _inputs(x, x_s, scale, norm, start, K, M, BM, BK, NORM) * by[None, :]
    y = tl.sum(sums, 1) + tl.load(place)
    if DEEP:
        y = tl.where(head >= heads, 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476)), y)
    m = tl.arange(0, BM)
    tl.store(out + m * count + at_out, y, mask=m < M)


@triton.jit
def add_hidden(
    scores, hidden, weight, heads, width, G: tl.constexpr, W: tl.constexpr, WAITS: tl.constexpr
):
    """What an MLP scorer adds to a row's scores: its inner numbers [width] by weight [G, width]."""
    if WAITS:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0)
    head, lane = tl.arange(0, G), tl.arange(0, W)
    inner = tl.load(hidden + row * width + lane, mask=lane < width, other=0.0)
    inside = (head < heads)[:, None] & (lane < width)[None, :]
    by = tl.load(weight + head[:, None] * width + lane[None, :], mask=inside, other=0.0)
    at = scores + row * heads + head
    score = tl.load(at, mask=head < heads, other=0.0)
    tl.store(at, score + tl.sum(by * inner[None, :], 1), mask=head < heads)


@triton.jit
def linears(
    x, norm, weight_0, weight_1, weight_2, bias_0, bias_1, bias_2, out_0, out_1, out_2, residual,
    cos, sin, score_weight, score_bias, scores, hidden_weight, hidden_bias, hidden,
    x_s, cos_s, n_0, n_1, n_2, tiles_0, tiles_1, tiles_2, heads, width, eps,
    K: tl.constexpr, M: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BS: tl.constexpr, KIND: tl.constexpr, HALF: tl.constexpr, SEGMENTS: tl.constexpr,
    NORM: tl.constexpr, BIASED: tl.constexpr, RESIDUAL: tl.constexpr, DEEP: tl.constexpr,
    DOT: tl.constexpr, STAGES: tl.constexpr, WAITS: tl.constexpr,
):  # fmt: skip
    """Up to three maps of the same rows (the first two with rotary positions), and scores."""
    if WAITS:
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    if SEGMENTS == 1:
        high_weight = weight_1 if KIND == GATED else weight_0
        high_bias = bias_1 if KIND == GATED else bias_0
        _segment(
            program, x, x_s, norm, eps, weight_0, high_weight, bias_0, high_bias, out_0, residual,
            cos, sin, cos_s, n_0,
            K, M, BM, BN, BK, KIND, HALF, NORM, BIASED, RESIDUAL, DOT, STAGES, WAITS,
        )  # fmt: skip
    else:
        if program < tiles_0:
            _segment(
                program, x, x_s, norm, eps, weight_0, weight_0, bias_0, bias_0, out_0, residual,
                cos, sin, cos_s, n_0,
                K, M, BM, BN, BK, KIND, HALF, NORM, BIASED, False, DOT, STAGES, WAITS,
            )  # fmt: skip
        elif program < tiles_0 + tiles_1:
            _segment(
                program - tiles_0, x, x_s, norm, eps, weight_1, weight_1, bias_1, bias_1, out_1,
                residual, cos, sin, cos_s, n_1,
                K, M, BM, BN, BK, KIND, HALF, NORM, BIASED, False, DOT, STAGES, WAITS,
            )  # fmt: skip
        elif program < tiles_0 + tiles_1 + tiles_2:
            _segment(
                program - tiles_0 - tiles_1, x, x_s, norm, eps, weight_2, weight_2, bias_2, bias_2,
                out_2, residual, cos, sin, cos_s, n_2,
                K, M, BM, BN, BK, PLAIN, HALF, NORM, BIASED, False, DOT, STAGES, WAITS,
            )  # fmt: skip
        else:
            _score(
                program - tiles_0 - tiles_1 - tiles_2, x, x_s, norm, eps, score_weight, score_bias,
                scores, heads, hidden_weight, hidden_bias, hidden, width,
                K, M, BM, BS, NORM, DEEP, WAITS,
            )  # fmt: skip


@triton.jit
def normalise(
    x, norm, out, x_s, eps, K: tl.constexpr, BK: tl.constexpr, WAITS: tl.constexpr
):  # fmt: skip
    """A root-mean-square norm of one row."""
    if WAITS:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0)
    scale = _norm_scale(x + row * x_s, x_s, eps, K, 1, 1, BK, True)
    for start in range(0, K, BK):
        at = start + tl.arange(0, BK)
        y = _inputs(x + row * x_s, x_s, scale, norm, start, K, 1, 1, BK, True)
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
    low = _rounded(_rounded(low * scale, q) * low_by, q)
    high = _rounded(_rounded(high * scale, q) * high_by, q)
    at = row * cos_s + lane
    low_cos = tl.load(cos + at, mask=mask, other=0.0).to(tl.float32)
    high_cos = tl.load(cos + D // 2 + at, mask=mask, other=0.0).to(tl.float32)
    low_sin = tl.load(sin + at, mask=mask, other=0.0).to(tl.float32)
    high_sin = tl.load(sin + D // 2 + at, mask=mask, other=0.0).to(tl.float32)
    turned = _rounded(low * low_cos, q) - _rounded(high * low_sin, q)
    other = _rounded(high * high_cos, q) + _rounded(low * high_sin, q)
    tl.store(place + lane, turned.to(q.dtype.element_ty), mask=mask)
    tl.store(place + D // 2 + lane, other.to(q.dtype.element_ty), mask=mask)
