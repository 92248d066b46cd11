"""Programs that multiply a few rows by some rows of a weight, with what stands before and after.

At one to sixteen rows a linear map costs what reading its weight costs. So a program takes few
outputs and all of the input: many programs, no partial sums between them, always the same result.
Outputs come in pairs (a low and a high one), which is what rotary positions (two halves of a head)
and gated MLPs (gate and up) need, and costs a plain map nothing.
What torch's own modules round, is rounded here: a norm's output, a product, a sum with a residual.
"""

import triton
import triton.language as tl

from sparsek_kernels.triton.linears.scores import score_head
from sparsek_kernels.triton.linears.segments import GATED, segment


@triton.jit
def linears(
    x, norm, weight_0, weight_1, weight_2, bias_0, bias_1, bias_2, out_0, out_1, out_2, residual,
    cos, sin, score_weight, score_bias, scores, hidden_weight, hidden_bias, hidden,
    x_s, cos_s, n_0, n_1, n_2, tiles_0, tiles_1, tiles_2, heads, width, eps,
    K: tl.constexpr, M: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BS: tl.constexpr, KIND: tl.constexpr, HALF: tl.constexpr, SEGMENTS: tl.constexpr,
    NORM: tl.constexpr, BIASED: tl.constexpr, RESIDUAL: tl.constexpr, DEEP: tl.constexpr,
    BX: tl.constexpr, BESIDE: tl.constexpr, DOT: tl.constexpr, EARLY: tl.constexpr,
    STAGES: tl.constexpr, AHEAD: tl.constexpr, HELD: tl.constexpr, WAITS: tl.constexpr,
):  # fmt: skip
    """Up to three maps of the same rows (the first two with rotary positions), and scores."""
    if WAITS:
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    if SEGMENTS == 1:
        high_weight = weight_1 if KIND == GATED else weight_0
        high_bias = bias_1 if KIND == GATED else bias_0
        segment(
            program, x, x_s, norm, eps, weight_0, high_weight, bias_0, high_bias, out_0, residual,
            cos, sin, cos_s, n_0, False,
            K, M, BM, BN, BK, KIND, HALF, NORM, BIASED, RESIDUAL, BX, BESIDE, DOT, EARLY, STAGES,
            AHEAD, HELD, WAITS,
        )  # fmt: skip
    elif program < tiles_0 + tiles_1 + tiles_2:
        first, second = program < tiles_0, program < tiles_0 + tiles_1
        weight = tl.where(first, weight_0, tl.where(second, weight_1, weight_2))
        bias = tl.where(first, bias_0, tl.where(second, bias_1, bias_2))
        out = tl.where(first, out_0, tl.where(second, out_1, out_2))
        n = tl.where(first, n_0, tl.where(second, n_1, n_2))
        before = tl.where(first, 0, tl.where(second, tiles_0, tiles_0 + tiles_1))
        segment(
            program - before, x, x_s, norm, eps, weight, weight, bias, bias, out, residual,
            cos, sin, cos_s, n, second,
            K, M, BM, BN, BK, KIND, HALF, NORM, BIASED, False, BX, BESIDE, DOT, EARLY, STAGES,
            AHEAD, HELD, WAITS,
        )  # fmt: skip
    else:
        score_head(
            program - tiles_0 - tiles_1 - tiles_2, x, x_s, norm, eps, score_weight, score_bias,
            scores, heads, hidden_weight, hidden_bias, hidden, width,
            K, M, BM, BS, NORM, DEEP, WAITS,
        )  # fmt: skip
