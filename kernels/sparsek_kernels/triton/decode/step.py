"""One token for every row of a state: insertion into the slots, attention over them.

One launch for a few rows, two for more, and all shapes are those of the state, whatever the
context: a step can be captured in a CUDA graph.
Insertion keeps exactly the set that prefix selection keeps: the token that leaves the window takes
the slot of the worst selected key if its score is larger; of equal scores the latest token is the
worst, so a leaving token, later than all of them, needs a strictly larger one.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import triton

from sparsek_kernels.state import SlotLayout, SparseKState, StateRows
from sparsek_kernels.triton.decode.attend import JOINED_NUMBERS, attend_slots, splits_of
from sparsek_kernels.triton.decode.insert import insert
from sparsek_kernels.triton.decode.one_launch import insert_and_attend
from sparsek_kernels.triton.launches.launch import launch
from sparsek_kernels.triton.launches.overlap import are_states_at_rest, launch_options, may_overlap
from sparsek_kernels.triton.tiles import LOG2_E, cap_of, dot_precision

# A layer of up to so many rows took 43 to 59 % less by one launch on an H200; of 16 rows, more.
ONE_LAUNCH_ROWS = 4
_TILE_BYTES = 32768  # of keys, and of values, that a program of one launch holds in registers
_WARPS = 8


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
    stand_ins: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Puts one token per row into its slots, in place, counts it, and attends to all slots.

    Args:
        q: [B, H, 1, D]. key, value: [B, G, 1, D]. score: [B, G, 1], any floating dtype.
        slopes: [G] or None. softcap, sink_logits [H], stand_ins [H, M, 2 D + 2]: as in
            sparsek_attention.
        out: where to write if it is contiguous, and nobody compiles this; or None.

    Returns:
        [B, H, 1, D] in q's dtype.
    """
    layout = state.layout
    pool, rows = (state.pool, state.rows) if isinstance(state, StateRows) else (state, None)
    pool.support = pool.tau = None
    tensors = (
        pool.keys, pool.values, pool.key_scale, pool.value_scale,
        pool.positions, pool.scores, pool.seen, rows, sink_logits,
        None if stand_ins is None else stand_ins.contiguous(),
    )  # fmt: skip
    settings = layout.topk, layout.window, layout.sinks, scale, softcap
    if torch.compiler.is_compiling():
        return _step_op(q, key, value, score, slopes, *tensors, *settings)
    if _is_one_launch(q, layout):
        # Calls over other rows of a pool may run beside this one: each counts for itself.
        arrived = pool.arrivals() if rows is None else None
        return _one_launch(q, key, value, score, slopes, *tensors, *settings, arrived, out)
    return _two_launches(q, key, value, score, slopes, *tensors, *settings, out)


def _tile_rows(group: int) -> int:
    """Rows of a tile of a KV head's queries: what tensor cores take at least."""
    return max(16, triton.next_power_of_2(group))


def _is_one_launch(q: torch.Tensor, layout: SlotLayout) -> bool:
    """Few rows, and heads whose tiles and sums fit in the registers of a program."""
    batch, heads, _, dim = q.shape
    padded = triton.next_power_of_2(dim)
    few = batch <= ONE_LAUNCH_ROWS and padded * q.element_size() <= 512
    return few and _tile_rows(heads // layout.heads) * padded <= 4096


def _cut(width: int, group: int, padded: int, size: int) -> tuple[int, int, int]:
    """(programs of a head, slots of a block, blocks of a program) of one launch.

    Args:
        width: slots of a head. padded: numbers of a key, each of `size` bytes where multiplied.
    """
    tile = min(256, _TILE_BYTES // (padded * size), 8192 // _tile_rows(group))
    # One program joins the sums of all.
    least = width * triton.next_power_of_2(group) * padded // JOINED_NUMBERS
    slots = max(tile, triton.next_power_of_2(least))
    return triton.cdiv(width, slots), tile, slots // tile


class _Prepared(NamedTuple):
    """What both ways give their kernels.

    Attributes:
        q: its last dimension dense, as those of the token.
        token: key, value, score and slopes (anything, where there are none); strides: of the first
            three, by row and head.
        held: the state's tensors in the kernels' order; held_strides: from row to row of each.
        rows: which of them the call means (anything, where it means all).
        table: see `_heads_table`.
        flags: which of all these are there.
    """

    q: torch.Tensor
    token: tuple[torch.Tensor, ...]
    strides: tuple[int, ...]
    held: tuple[torch.Tensor, ...]
    held_strides: tuple[int, ...]
    rows: torch.Tensor
    table: torch.Tensor
    flags: dict[str, bool]


def _prepared(
    q, key, value, score, slopes, keys, values, key_scale, value_scale, positions, scores, seen,
    rows, layout: SlotLayout,
) -> _Prepared:  # fmt: skip
    q, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (q, key, value))
    quantized = key_scale is not None
    scales = (key_scale, value_scale) if quantized else (scores, scores)  # else never read
    held = (keys, values, *scales, positions, scores, seen)
    return _Prepared(
        q,
        token=(key, value, score, score if slopes is None else slopes),
        strides=(*key.stride()[:2], *value.stride()[:2], *score.stride()[:2]),
        held=held,
        held_strides=tuple(tensor.stride(0) for tensor in held),
        rows=seen if rows is None else rows.contiguous(),
        table=_heads_table(layout, q.device),
        flags=dict(SLOPED=slopes is not None, QUANTIZED=quantized, POOLED=rows is not None),
    )


def _sums(
    q: torch.Tensor, splits: int, out: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Room for each split's sums and for its logits and totals, and for what they join to."""
    batch, heads, _, dim = q.shape
    part_out = torch.empty(batch, heads, splits, dim, dtype=torch.float32, device=q.device)
    part_lse = torch.empty(batch, heads, splits, 2, dtype=torch.float32, device=q.device)
    if out is None or not out.is_contiguous():
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return part_out, part_lse, out


def _one_launch(
    q, key, value, score, slopes, keys, values, key_scale, value_scale, positions, scores, seen,
    rows, sink_logits, stand_ins, topk, window, sinks, scale, softcap, arrived, out=None,
) -> torch.Tensor:  # fmt: skip
    layout = SlotLayout(tuple(topk), window, sinks)
    given = _prepared(
        q, key, value, score, slopes, keys, values, key_scale, value_scale, positions, scores,
        seen, rows, layout,
    )  # fmt: skip
    batch, q_heads, _, dim = q.shape
    groups, group = layout.heads, q_heads // layout.heads
    if arrived is None:
        arrived = torch.zeros(batch, groups + 1, dtype=torch.int32, device=q.device)
    overlap = may_overlap(q.device)
    padded = max(16, triton.next_power_of_2(dim))
    splits, tile, blocks = _cut(layout.width, group, padded, q.element_size())
    part_out, part_lse, out = _sums(q, splits, out)
    launch(
        insert_and_attend, (splits, groups, batch),
        given.q, *given.token, *given.held, given.rows, given.table,
        part_out, part_lse, arrived, out, q if sink_logits is None else sink_logits,
        q if stand_ins is None else stand_ins,
        given.q.stride(0), given.q.stride(1), *given.strides, *given.held_strides,
        group, sinks, window, scale * LOG2_E, cap_of(softcap), splits,
        ROWS=_tile_rows(group), BN=tile, BLOCKS=blocks,
        SPLITS=triton.next_power_of_2(splits), GROUP=triton.next_power_of_2(group),
        D=dim, DP=padded, BLOCK=_scanned(layout), PRECISION=dot_precision(q.dtype), **given.flags,
        CAPPED=softcap is not None, SINK_LOGITS=sink_logits is not None,
        STAND_INS=_count(stand_ins), WAITS=overlap,
        AT_REST=rows is None and are_states_at_rest(), num_warps=_WARPS, num_stages=1,
        enable_fp_fusion=False, **launch_options(overlap),
    )  # fmt: skip
    return out


def _count(stand_ins: torch.Tensor | None) -> int:
    """Stand-ins of each query head."""
    return 0 if stand_ins is None else stand_ins.shape[1]


def _scanned(layout: SlotLayout) -> int:
    """Selected slots of a head that are looked at together."""
    return min(1024, max(16, triton.next_power_of_2(max(layout.topk))))


def _two_launches(
    q, key, value, score, slopes, keys, values, key_scale, value_scale, positions, scores, seen,
    rows, sink_logits, stand_ins, topk, window, sinks, scale, softcap, out=None,
) -> torch.Tensor:  # fmt: skip
    layout = SlotLayout(tuple(topk), window, sinks)
    given = _prepared(
        q, key, value, score, slopes, keys, values, key_scale, value_scale, positions, scores,
        seen, rows, layout,
    )  # fmt: skip
    batch, q_heads, _, dim = q.shape
    groups, group = layout.heads, q_heads // layout.heads
    # How many programs of a head have arrived, and the place of its token.
    arrived = torch.empty(2, batch, groups, dtype=torch.int32, device=q.device)
    launch(
        insert, (batch, groups),
        *given.held, given.rows, given.table, arrived, *given.token,
        *given.strides, *given.held_strides, groups, sinks, window,
        D=dim, DP=triton.next_power_of_2(dim), BLOCK=_scanned(layout), **given.flags,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    padded = max(16, triton.next_power_of_2(dim))
    splits, split_slots = splits_of(layout, batch, group, padded)
    part_out, part_lse, out = _sums(q, splits, out)
    slots, flags = given.held[:5], {name: given.flags[name] for name in ("QUANTIZED", "POOLED")}
    launch(
        attend_slots, (splits, groups, batch),
        given.q, *slots, seen, given.rows, given.table,
        part_out, part_lse, arrived, out, q if sink_logits is None else sink_logits,
        q if stand_ins is None else stand_ins,
        given.q.stride(0), given.q.stride(1), *given.held_strides[:5], given.held_strides[6],
        group, sinks + window, scale * LOG2_E, cap_of(softcap), splits, split_slots,
        ROWS=_tile_rows(group), BN=32 if padded > 128 else 64,
        SPLITS=triton.next_power_of_2(splits), GROUP=triton.next_power_of_2(group),
        D=dim, DP=padded, PRECISION=dot_precision(q.dtype), **flags,
        CAPPED=softcap is not None, SINK_LOGITS=sink_logits is not None,
        STAND_INS=_count(stand_ins), num_warps=4, num_stages=3,
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
    stand_ins: torch.Tensor | None,
    topk: Sequence[int],
    window: int,
    sinks: int,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """`step` as torch.compile sees it: one opaque node that changes the state in place."""
    return _two_launches(
        q, key, value, score, slopes, keys, values, key_scale, value_scale, positions, scores, seen,
        rows, sink_logits, stand_ins, topk, window, sinks, scale, softcap,
    )  # fmt: skip


@_step_op.register_fake
def _(q, *_):
    return q.new_empty(q.shape)
