"""Scores of a few rows by themselves: a float32 map of one output per KV head, one launch."""

import torch
import triton
import triton.language as tl

from sparsek_kernels.triton.launches.launch import launch

_AT_ONCE = 4096  # numbers of a row that a program holds


@triton.jit
def _score(x, weight, bias, scores, x_s, rows, K: tl.constexpr, BK: tl.constexpr):
    """The score of one row and head: rows differ in nothing but their numbers."""
    row, head = tl.program_id(0), tl.program_id(1)
    x += row.to(tl.int64) * x_s
    weight += head * K
    sums = tl.zeros([BK], tl.float32)
    for start in range(0, K, BK):
        at = start + tl.arange(0, BK)
        by = tl.load(weight + at, mask=at < K, other=0.0)
        sums += tl.load(x + at, mask=at < K, other=0.0).to(tl.float32) * by
    tl.store(scores + head * rows + row, tl.sum(sums, 0) + tl.load(bias + head))


def row_scores(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """x W^T + b in float32, with one sum's order for all rows, however many there are.

    Args:
        x: [N, C] of any floating dtype, its last dimension dense. weight: [G, C] float32, dense.
        bias: [G] float32.

    Returns:
        [G, N] float32.
    """
    rows, size = x.shape
    scores = torch.empty(weight.shape[0], rows, dtype=torch.float32, device=x.device)
    launch(
        _score, (rows, weight.shape[0]),
        x, weight, bias, scores, x.stride(0), rows,
        K=size, BK=min(_AT_ONCE, triton.next_power_of_2(size)), num_warps=4,
    )  # fmt: skip
    return scores
