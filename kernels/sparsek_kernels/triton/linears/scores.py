"""Scores of the tokens of a step: one linear map in float32, or an MLP."""

import triton
import triton.language as tl

from sparsek_kernels.triton.linears.inputs import inputs, norm_scale


@triton.jit
def score_head(
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
    scale = norm_scale(x, x_s, eps, K, M, BM, BK, NORM)
    sums = tl.zeros([BM, BK], tl.float32)
    for start in range(0, K, BK):
        at = start + tl.arange(0, BK)
        by = tl.load(row + at, mask=at < K, other=0.0)
        sums += inputs(x, x_s, scale, norm, start, K, M, BM, BK, NORM) * by[None, :]
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
