"""What a program of the attention kernels walks: a tile of rows, and the keys that it sees.

A tile is `BQ` neighbouring queries times `HG` heads of one group, which all see nearly the same
keys. Keys seen by every row of the tile need no mask: the front of the tile's key list, and the
window from `ramp_end` on. The rest is collected in one masked loop: leftover and partly live
selected keys, both ramps of the window.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
STRAIGHT_THROUGH, LOG, KV = 0, 1, 2
GATES = {"straight_through": STRAIGHT_THROUGH, "log": LOG, "kv": KV}

_LOW = tl.constexpr(-1.0e30)


class Sequence(NamedTuple):
    """Scalars; the fields are those of `geometry.SEQUENCE_FIELDS`, in their order."""

    batch: tl.tensor  # int64
    first_query: tl.tensor
    queries: tl.tensor
    first_key: tl.tensor
    keys: tl.tensor
    window_first: tl.tensor


@triton.jit
def sequence_at(sequences, number):
    """Line `number` of the table."""
    line = sequences + 6 * number
    return Sequence(
        tl.load(line).to(tl.int64),
        tl.load(line + 1),
        tl.load(line + 2),
        tl.load(line + 3),
        tl.load(line + 4),
        tl.load(line + 5),
    )


class Tile(NamedTuple):
    """Rows of a program; t counts keys of the sequence's row, a query is known by its own key.

    batch, head, row: batch item, KV head, and their place among all KV heads of the batch, scalars.
    query, q_head, t: [rows], where a row's query stands. inside: [rows], whether it exists.
    stat: [rows], its place in [B, H, N]. t0, t1: first query and the one after the last, scalars.
    """

    batch: tl.tensor
    head: tl.tensor
    row: tl.tensor
    query: tl.tensor
    q_head: tl.tensor
    t: tl.tensor
    inside: tl.tensor
    stat: tl.tensor
    t0: tl.tensor
    t1: tl.tensor


@triton.jit
def tile_of(its, local, heads, group, queries, BQ: tl.constexpr, HG: tl.constexpr):
    """The program's tile: queries local .. local + BQ of a sequence, heads by program_id(1)."""
    parts = group // HG
    head = tl.program_id(1) // parts
    part = tl.program_id(1) % parts
    last = its.first_key + its.keys
    t0 = last - its.queries + local
    t1 = tl.minimum(t0 + BQ, last)
    lane = tl.arange(0, BQ * HG)
    t = t0 + lane // HG
    query = (its.first_query + local + lane // HG).to(tl.int64)
    q_head = (head * group + part * HG + lane % HG).to(tl.int64)
    stat = (its.batch * heads * group + q_head) * queries + query
    row = its.batch * heads + head
    return Tile(its.batch, head, row, query, q_head, t, t < t1, stat, t0, t1)


class Walk(NamedTuple):
    """The keys of a tile, all scalars.

    listed: pointer to the tile's list. front, back: entries at its two ends. room: what it holds.
    whole, middle: keys without masks, from the list and from the window (multiples of BN).
    low, ramp_end: first key of the window that any query sees, and that all queries see.
    """

    listed: tl.tensor
    front: tl.tensor
    back: tl.tensor
    room: tl.tensor
    whole: tl.tensor
    middle: tl.tensor
    low: tl.tensor
    ramp_end: tl.tensor


@triton.jit
def walk_of(one, at, window_first, window, offsets, counts, listed, BN: tl.constexpr):
    """The walk of tile `at`, whose list is number `one`."""
    base = tl.load(offsets + one)
    room = tl.load(offsets + one + 1) - base
    front = tl.load(counts + 2 * one)
    back = tl.load(counts + 2 * one + 1)
    low = tl.maximum(window_first, at.t0 - window + 1)
    ramp_end = tl.minimum(tl.maximum(at.t1 - window, low), at.t1)
    middle = tl.maximum(at.t0 + 1 - ramp_end, 0) // BN * BN
    return Walk(listed + base, front, back, room, front // BN * BN, middle, low, ramp_end)


@triton.jit
def clear_key(start, lane, walk, t1):
    """Keys start.. of the run [front of the list, window from `ramp_end`]."""
    near = tl.minimum(walk.ramp_end + start - walk.whole + lane, t1 - 1)
    return tl.where(
        start < walk.whole, tl.load(walk.listed + start + lane, mask=start < walk.whole, other=0),
        near,
    )  # fmt: skip


@triton.jit
def masked_count(walk, t1):
    """How many keys some query of the tile does not see."""
    second = walk.ramp_end + walk.middle
    return walk.front - walk.whole + walk.back + (walk.ramp_end - walk.low) + t1 - second


@triton.jit
def masked_key(item, walk, at, row_end, window):
    """Keys of some items of the masked loop: key, selected or of the window, there, seen by whom.

    Returns:
        key, is_selected, inside [BN] and visible [rows, BN].
    """
    left = walk.front - walk.whole
    selected = left + walk.back
    ramp = walk.ramp_end - walk.low
    second = walk.ramp_end + walk.middle
    is_selected = item < selected
    inside = item < selected + ramp + at.t1 - second
    where = tl.where(item < left, walk.whole + item, walk.room - walk.back + item - left)
    key = tl.load(walk.listed + where, mask=is_selected, other=0)
    near = tl.where(
        item < selected + ramp, walk.low + item - selected, second + item - selected - ramp
    )
    key = tl.where(is_selected, key, near)
    key = tl.where(inside, key, 0)
    begin = tl.where(is_selected, key + window, key)
    stop = tl.where(is_selected, tl.load(row_end + key, mask=is_selected, other=0), key + window)
    stop = tl.where(inside, stop, 0)
    visible = (at.t[:, None] >= begin[None, :]) & (at.t[:, None] < stop[None, :])
    return key, is_selected, inside, visible


@triton.jit
def gate_row(tau, where, inside):
    """tau of some queries as (centre, float32 distance from it): exact whatever the offset."""
    value = tl.load(tau + where, mask=inside, other=-float("inf"))
    known = value > -1.0e300
    centre = tl.max(tl.where(known, value, -1.0e300), 0)
    centre = tl.where(centre > -1.0e300, centre, 0.0)
    return centre, tl.where(known, value - centre, _LOW).to(tl.float32)


@triton.jit
def gate_of(row_gate, key, centre, tau_row, selected):
    """m [rows, BN] of some keys; 1 where they are not `selected` (a scalar or [1, BN])."""
    above = (tl.load(row_gate + key) - centre).to(tl.float32)
    gate = tl.minimum(tl.maximum(above[None, :] - tau_row[:, None], 0.0), 1.0)
    return tl.where(selected, gate, 1.0)


@triton.jit
def capped(logits, cap):
    """cap * tanh(x / cap); both in base 2, which does not matter to the quotient."""
    # tanh(x) = 1 - 2 / (e^(2 x) + 1): exact at both ends, where e^(2 x) is 0 or infinite.
    return cap - 2.0 * cap / (tl.exp2(logits * (2.0 * 1.4426950408889634 / cap)) + 1.0)


@triton.jit
def load_rows(
    base, offset, d, inside, D: tl.constexpr, DP: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """[rows, DP] elements at base + offset[row] + d; zeros beyond D and, if MASKED, outside."""
    where = base + offset[:, None] + d[None, :]
    if MASKED and D == DP:
        return tl.load(where, mask=inside[:, None], other=0.0)
    if MASKED:
        return tl.load(where, mask=inside[:, None] & (d < D)[None, :], other=0.0)
    if D == DP:
        return tl.load(where)
    return tl.load(where, mask=(d < D)[None, :], other=0.0)


@triton.jit
def index_of(key, WIDE: tl.constexpr):
    """The key as a number that, times a stride, does not overflow."""
    return key.to(tl.int64) if WIDE else key


def cap_of(softcap: float | None) -> float:
    """The cap as kernels take it, in base 2; 0 where CAPPED is off."""
    return 0.0 if softcap is None else softcap * LOG2_E


def strides(tensor: torch.Tensor) -> tuple[int, int, int]:
    return tensor.stride(0), tensor.stride(1), tensor.stride(2)


def rows_of(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself if its last dimension is dense, else a copy."""
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def empty_rows(q: torch.Tensor) -> torch.Tensor:
    """[B, H, N, D] for an output or dq; in memory [B, N, H, D], which the next map reads as it is.

    With heads before tokens a model copies both, and keeps the output twice for its backward pass.
    """
    batch, heads, queries, size = q.shape
    return q.new_empty(batch, queries, heads, size).transpose(1, 2)


def needs_wide_index(*tensors: torch.Tensor) -> bool:
    """Whether an offset inside one row of [B, G, M, D] can pass 2^31."""
    return any(t.shape[2] * t.stride(2) + t.shape[3] >= 2**31 for t in tensors)


def dot_precision(dtype: torch.dtype) -> str:
    return "ieee" if dtype == torch.float32 else "tf32"


def query_grid(geometry, lists, config) -> tuple[tuple[int, int], int, int]:
    """Programs of a kernel over tiles of queries, and queries and heads of each."""
    group = geometry.group
    heads = min(config.heads, group & -group)  # a power of two that divides the group
    queries = min(config.rows // heads, lists.size)
    tiles = lists.tiles.shape[0] * (lists.size // queries)
    return (tiles, geometry.heads * (group // heads)), queries, heads
