"""Effective scores inside kernels, and by themselves; the twin of `sparsek_kernels.scores`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsek_kernels import scores as twin
from sparsek_kernels.scores import LARGEST

BLOCK = 1024  # tokens of a program
_LARGEST = tl.constexpr(LARGEST)


@triton.jit
def comparable(score):
    """float64 scores as `scores.comparable` makes them: NaN as -inf, +inf as the largest number."""
    return tl.where(score > -float("inf"), tl.minimum(score, _LARGEST), -float("inf"))


@triton.jit
def effective_score(score, slope, place, SLOPED: tl.constexpr):
    """u + slope * place of any dtypes, in float64, and comparable.

    Where it is compiled fused multiply-add must be off: all kernels find the same bits.
    """
    score = score.to(tl.float64)
    if SLOPED:
        score += slope.to(tl.float64) * place.to(tl.float64)
    return comparable(score)


@triton.jit(do_not_specialize=("tokens", "row_b"))
def _effective_scores(
    scores, slopes, places, effective, heads, tokens, row_b, head_b, step,
    SLOPED: tl.constexpr, PLACED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of tokens of one head of one row."""
    row = tl.program_id(1).to(tl.int64)
    head = row % heads
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < tokens
    at = scores + row // heads * row_b + head * head_b + token.to(tl.int64) * step
    place, slope = token, 0.0
    if PLACED:
        place = tl.load(places + token, mask=inside, other=0)
    if SLOPED:
        slope = tl.load(slopes + head)
    found = effective_score(tl.load(at, mask=inside, other=0), slope, place, SLOPED)
    tl.store(effective + row * tokens + token, found, mask=inside)


@triton.jit(do_not_specialize=("tokens", "row_b"))
def _effective_gradients(
    grad, effective, places, d_scores, d_slopes, heads, tokens, row_b, head_b, step,
    SLOPED: tl.constexpr, PLACED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """d(scores) of a block of tokens, and what they add to d(slope), float64."""
    row = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < tokens
    own = tl.load(effective + row * tokens + token, mask=inside, other=-float("inf"))
    moves = (own > -float("inf")) & (own < _LARGEST)  # else it is what it is at any score
    given = tl.load(grad + row * tokens + token, mask=moves, other=0.0)
    at = d_scores + row // heads * row_b + row % heads * head_b + token.to(tl.int64) * step
    if d_scores.dtype.element_ty == tl.float64:
        tl.store(at, given, mask=inside)
    else:  # halves by way of float32, as PyTorch rounds
        tl.store(at, given.to(tl.float32), mask=inside)
    if SLOPED:
        place = token
        if PLACED:
            place = tl.load(places + token, mask=inside, other=0)
        part = tl.sum(given * place.to(tl.float64), 0)
        tl.store(d_slopes + row * tl.num_programs(0) + tl.program_id(0), part)


class _EffectiveScores(torch.autograd.Function):
    # PyTorch's own operations would be five launches, and would keep a second float64 tensor.
    @staticmethod
    def forward(ctx, scores: Tensor, slopes: Tensor | None, places: Tensor | None) -> Tensor:
        effective = _launch(scores, slopes, places)
        ctx.save_for_backward(effective, places)
        ctx.layout = scores.dtype, scores.stride(-1) == 1
        ctx.slopes = None if slopes is None else slopes.dtype
        return effective

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        effective, places = ctx.saved_tensors
        batch, heads, tokens = effective.shape
        (dtype, by_head), device = ctx.layout, effective.device
        size = (batch, heads, tokens) if by_head else (batch, tokens, heads)
        d_scores = torch.empty(size, dtype=dtype, device=device)
        if not by_head:
            d_scores = d_scores.transpose(1, 2)
        blocks = triton.cdiv(tokens, BLOCK)
        sloped = ctx.needs_input_grad[1]
        d_slopes = effective.new_empty((batch, heads, blocks)) if sloped else None
        _effective_gradients[(blocks, batch * heads)](
            grad.contiguous(), effective, places, d_scores, d_slopes, heads, tokens,
            *d_scores.stride(), SLOPED=sloped, PLACED=places is not None, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
        return d_scores, d_slopes.sum((0, 2)).to(ctx.slopes) if sloped else None, None


def _launch(scores: Tensor, slopes: Tensor | None, places: Tensor | None) -> Tensor:
    batch, heads, tokens = scores.shape
    effective = torch.empty(scores.shape, dtype=torch.float64, device=scores.device)
    _effective_scores[(triton.cdiv(tokens, BLOCK), batch * heads)](
        scores, slopes, places, effective, heads, tokens, *scores.stride(),
        SLOPED=slopes is not None, PLACED=places is not None, BLOCK=BLOCK,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return effective


def effective_scores(scores: Tensor, slopes: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """`sparsek_kernels.effective_scores` in one launch, to the bit; its gradient in another.

    Args:
        scores: [B, G, N], any floating dtype and strides. slopes: [G] or None.
        cu_seqlens: int32 [docs + 1], documents packed in one row, or None.

    Returns:
        [B, G, N] float64. No gradient goes on to scores of which it is not finite.
    """
    if torch.compiler.is_compiling():  # operations that it sees into
        return twin.effective_scores(scores, slopes, _places(scores, slopes, cu_seqlens))
    places = None if cu_seqlens is None else _places(scores, slopes, cu_seqlens)
    if torch.is_grad_enabled():
        return _EffectiveScores.apply(scores, slopes, places)
    return _launch(scores, slopes, places)


def _places(scores: Tensor, slopes: Tensor | None, cu_seqlens: Tensor | None) -> Tensor | None:
    """Places [N] of the tokens in their documents, float64, where a slope asks for them."""
    if slopes is None:
        return None
    places = torch.arange(scores.shape[-1], device=scores.device, dtype=torch.float64)
    if cu_seqlens is not None:
        starts = cu_seqlens.to(places.dtype)
        places = places - starts[torch.searchsorted(starts, places, right=True) - 1]
    return places
