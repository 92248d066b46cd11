"""delta of the flash-attention backward: rowsum(out * do)."""

import torch
import triton
import triton.language as tl

from sparsek_kernels.triton.launches.launch import launch
from sparsek_kernels.triton.tiles import (
    load_rows,
    strides,
)


@triton.jit
def _delta(out, do, delta, o_b, o_h, o_n, do_b, do_h, do_n, heads, queries,
           ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):  # fmt: skip
    """delta = rowsum(out * do), float32 [B, H, N]."""
    row = tl.program_id(1).to(tl.int64)
    batch = row // heads
    head = row % heads
    query = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = query < queries
    d = tl.arange(0, DP)
    at = query.to(tl.int64)
    a = load_rows(out + batch * o_b + head * o_h, at * o_n, d, inside, D, DP, True)
    b = load_rows(do + batch * do_b + head * do_h, at * do_n, d, inside, D, DP, True)
    total = tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)
    tl.store(delta + row * queries + query, total, mask=inside)


def row_products(out: torch.Tensor, do: torch.Tensor) -> torch.Tensor:
    """delta [B, H, N] float32 of the flash-attention backward: rowsum(out * do)."""
    batch, heads, queries, dim = out.shape
    delta = torch.empty(batch, heads, queries, dtype=torch.float32, device=out.device)
    rows = 64
    launch(
        _delta, (triton.cdiv(queries, rows), batch * heads),
        out, do, delta, *strides(out), *strides(do), heads, queries,
        ROWS=rows, D=dim, DP=max(16, triton.next_power_of_2(dim)), num_warps=4,
    )  # fmt: skip
    return delta
