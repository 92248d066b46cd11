"""Effective scores inside kernels, and by themselves; the twin of `sparsek_kernels.scores`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsek_kernels.scores import LARGEST
from sparsek_kernels.triton.documents.tables import document_at
from sparsek_kernels.triton.geometry import Geometry
from sparsek_kernels.triton.launches.launch import launch

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


@triton.jit
def places_in_documents(sequences, token, inside, count, steps, PACKED: tl.constexpr):
    """Of tokens of a row, in their documents."""
    first = token * 0
    if PACKED:
        its = sequences + 6 * document_at(sequences, token, count, steps)
        first = tl.load(its + 3, mask=inside, other=0)
    return token - first


@triton.jit(do_not_specialize=("count", "steps", "tokens", "row_b"))
def _effective_scores(
    scores, slopes, sequences, effective, count, steps, heads, tokens, row_b, head_b, step,
    SLOPED: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of tokens of one head of one row."""
    row = tl.program_id(1).to(tl.int64)
    head = row % heads
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < tokens
    at = scores + row // heads * row_b + head * head_b + token.to(tl.int64) * step
    place, slope = token, 0.0
    if SLOPED:
        slope = tl.load(slopes + head)
        place = places_in_documents(sequences, token, inside, count, steps, PACKED)
    found = effective_score(tl.load(at, mask=inside, other=0), slope, place, SLOPED)
    tl.store(effective + row * tokens + token, found, mask=inside)


@triton.jit(do_not_specialize=("count", "steps", "tokens", "row_b"))
def _effective_gradients(
    grad, effective, sequences, d_scores, d_slopes,
    count, steps, heads, tokens, row_b, head_b, step,
    SLOPED: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr,
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
        place = places_in_documents(sequences, token, inside, count, steps, PACKED)
        part = tl.sum(given * place.to(tl.float64), 0)
        tl.store(d_slopes + row * tl.num_programs(0) + tl.program_id(0), part)


def effective_scores(scores: Tensor, slopes: Tensor | None, shape: Geometry) -> Tensor:
    """`sparsek_kernels.effective_scores` in one launch, to the bit, and without a gradient.

    Args:
        scores: [B, G, N], any floating dtype and strides. slopes: [G] or None.

    Returns:
        [B, G, N] float64.
    """
    batch, heads, tokens = scores.shape
    effective = torch.empty(scores.shape, dtype=torch.float64, device=scores.device)
    launch(
        _effective_scores, (triton.cdiv(tokens, BLOCK), batch * heads),
        scores, slopes, shape.sequences, effective, *_documents(shape), heads, tokens,
        *scores.stride(), SLOPED=slopes is not None, PACKED=shape.packed, BLOCK=BLOCK,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return effective


def effective_gradients(
    grad: Tensor,
    effective: Tensor,
    shape: Geometry,
    *,
    scores: torch.dtype,
    by_token: bool,
    slopes: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    """d(scores) [B, G, N] and d(slopes) [G], in one launch and a sum.

    PyTorch's own operations would be ten, and would have kept a second float64 tensor.

    Args:
        grad: float64 [B, G, N], of `effective` [B, G, N]. None of it goes on to scores of which
            that is not finite.
        scores: their dtype; by_token: whether they lie as [B, N, G]. slopes: their dtype, or None
            where they do not learn.
    """
    batch, heads, tokens = effective.shape
    size = (batch, tokens, heads) if by_token else (batch, heads, tokens)
    d_scores = torch.empty(size, dtype=scores, device=effective.device)
    if by_token:
        d_scores = d_scores.transpose(1, 2)
    sloped, blocks = slopes is not None, triton.cdiv(tokens, BLOCK)
    parts = effective.new_empty((batch, heads, blocks)) if sloped else None
    launch(
        _effective_gradients, (blocks, batch * heads),
        grad.contiguous(), effective, shape.sequences, d_scores, parts, *_documents(shape), heads,
        tokens, *d_scores.stride(), SLOPED=sloped, PACKED=shape.packed, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return d_scores, parts.sum((0, 2)).to(slopes) if sloped else None


def _documents(shape: Geometry) -> tuple[int, int]:
    return shape.count, shape.count.bit_length()
