"""One token for every row of a state: insertion into the slots, attention over them.

Two launches, and all shapes are those of the state, whatever the context: a step can be captured in
a CUDA graph.
Insertion keeps exactly the set that prefix selection keeps: the token that leaves the window takes
the slot of the worst selected key if its score is larger; of equal scores the latest token is the
worst, so a leaving token, later than all of them, needs a strictly larger one.
"""

from collections.abc import Sequence
from functools import cache

import torch
import triton

from sparsek_kernels.state import SlotLayout, SparseKState, StateRows
from sparsek_kernels.triton.decode.attend import attend_slots, splits_of
from sparsek_kernels.triton.decode.insert import insert
from sparsek_kernels.triton.overlap import launch_options, may_overlap
from sparsek_kernels.triton.tiles import LOG2_E, cap_of, dot_precision

# Rows at which both launches may begin early, so that maps after them ask for weights meanwhile:
# on an H200 four rows gain 3 % of a step by it; one and sixteen lose 2 and 3 %.
BEGIN_EARLY = range(2, 5)


@cache
def _heads_table(layout: SlotLayout, device: torch.device) -> torch.Tensor:
    """int32 [G, 2]: first slot and k of each head; never dropped, captured graphs read it."""
    rows, first = [], 0
    for k in layout.topk:
        rows.append((first, k))
        first += layout.sinks + k + layout.window
    return torch.tensor(rows, dtype=torch.int32, device=device)


def step(
    q: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score: torch.Tensor,
    slopes: torch.Tensor | None,
    state: SparseKState | StateRows,
    *,
    scale: float,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Puts one token per row into its slots, in place, counts it, and attends to all slots.

    Args:
        q: [B, H, 1, D]. key, value: [B, G, 1, D]. score: [B, G, 1], any floating dtype.
        slopes: [G] or None. softcap, sink_logits [H]: as in sparsek_attention.

    Returns:
        [B, H, 1, D] in q's dtype.
    """
    layout = state.layout
    pool, rows = (state.pool, state.rows) if isinstance(state, StateRows) else (state, None)
    pool.support = pool.tau = None
    tensors = (
        pool.keys, pool.values, pool.key_scale, pool.value_scale,
        pool.positions, pool.scores, pool.seen, rows, sink_logits,
    )  # fmt: skip
    run = _step_op if torch.compiler.is_compiling() else _step
    settings = layout.topk, layout.window, layout.sinks, scale, softcap
    return run(q, key, value, score, slopes, *tensors, *settings)


def _step(
    q, key, value, score, slopes, keys, values, key_scale, value_scale, positions, scores, seen,
    rows, sink_logits, topk, window, sinks, scale, softcap,
) -> torch.Tensor:  # fmt: skip
    layout, device = SlotLayout(tuple(topk), window, sinks), q.device
    batch, q_heads, _, dim = q.shape
    groups, group = layout.heads, q_heads // layout.heads
    q, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (q, key, value))
    table = _heads_table(layout, device)
    arrived = torch.empty(batch, groups, dtype=torch.int32, device=device)
    sloped, quantized = slopes is not None, key_scale is not None
    scales = (key_scale, value_scale) if quantized else (scores, scores)  # else never read
    pooled = rows is not None
    pool_rows = rows if pooled else seen  # else never read
    held = (keys, values, *scales, positions, scores, seen)
    strides = [tensor.stride(0) for tensor in held]
    overlap = batch in BEGIN_EARLY and may_overlap(device)
    insert[(batch, groups)](
        *held, pool_rows, table, arrived,
        key, value, score, slopes if sloped else score,
        key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        score.stride(0), score.stride(1), *strides, groups, sinks, window,
        D=dim, DP=triton.next_power_of_2(dim),
        BLOCK=min(1024, max(16, triton.next_power_of_2(max(layout.topk)))), SLOPED=sloped,
        QUANTIZED=quantized, POOLED=pooled, WAITS=overlap, num_warps=4, enable_fp_fusion=False,
        **launch_options(overlap),
    )  # fmt: skip
    padded = max(16, triton.next_power_of_2(dim))
    splits, split_slots = splits_of(layout, batch, group, padded)
    part_out = torch.empty(batch, q_heads, splits, dim, dtype=torch.float32, device=device)
    part_lse = torch.empty(batch, q_heads, splits, 2, dtype=torch.float32, device=device)
    out = torch.empty(batch, q_heads, 1, dim, dtype=q.dtype, device=device)
    attend_slots[(splits, groups, batch)](
        q, keys, values, *scales, positions, seen, pool_rows, table,
        part_out, part_lse, arrived, out, q if sink_logits is None else sink_logits,
        q.stride(0), q.stride(1), *strides[:5], strides[6],
        group, sinks + window, scale * LOG2_E, cap_of(softcap), splits, split_slots,
        ROWS=max(16, triton.next_power_of_2(group)), BN=32 if padded > 128 else 64,
        SPLITS=triton.next_power_of_2(splits), GROUP=triton.next_power_of_2(group),
        D=dim, DP=padded, PRECISION=dot_precision(q.dtype), QUANTIZED=quantized,
        POOLED=pooled, CAPPED=softcap is not None, SINK_LOGITS=sink_logits is not None,
        WAITS=overlap, num_warps=4, num_stages=3, **launch_options(overlap),
    )  # fmt: skip
    return out


@torch.library.custom_op(
    "sparsek::decode_step",
    mutates_args=("keys", "values", "key_scale", "value_scale", "positions", "scores", "seen"),
)
def _step_op(
    q: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score: torch.Tensor,
    slopes: torch.Tensor | None,
    keys: torch.Tensor,
    values: torch.Tensor,
    key_scale: torch.Tensor | None,
    value_scale: torch.Tensor | None,
    positions: torch.Tensor,
    scores: torch.Tensor,
    seen: torch.Tensor,
    rows: torch.Tensor | None,
    sink_logits: torch.Tensor | None,
    topk: Sequence[int],
    window: int,
    sinks: int,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """`step` as torch.compile sees it: one opaque node that changes the state in place."""
    return _step(
        q, key, value, score, slopes, keys, values, key_scale, value_scale, positions, scores, seen,
        rows, sink_logits, topk, window, sinks, scale, softcap,
    )  # fmt: skip


@_step_op.register_fake
def _(q, *_):
    return q.new_empty(q.shape)
