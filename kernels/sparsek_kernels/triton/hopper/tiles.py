"""What the Hopper kernels share: tiles of 128 rows, halves of 64 that compute, warps that copy.

Keys of a tile are numbered in one run of items: the part of the window that all its queries see,
the front of its key list, the back of the list, the two ramps of the window. The first two need no
mask, but for the last step that they do not fill.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy

from sparsek_kernels.triton.tiles import Sequence

ROWS = 128
HALF = gl.constexpr(64)  # rows of one computing warpgroup
COPIERS = gl.constexpr(128)  # threads of the copying warpgroup
# Sizes that differ from call to call: compiling anew for multiples of 16 would take five seconds.
SIZES = ("queries", "row_keys", "columns", "window", "first_tile", "tile_step")


class Span(NamedTuple):
    """The items of a tile of queries t0 .. t1, see the module's head.

    near, first_near: how many keys of the window all queries see, and the first of them.
    front, back, room: entries at both ends of the tile's list, and what it has room for.
    low, ramp: the first key of the window that any query sees, and keys up to `first_near`.
    total: all items.
    """

    near: Any
    first_near: Any
    front: Any
    back: Any
    room: Any
    low: Any
    ramp: Any
    total: Any
    t0: Any
    t1: Any


@gluon.jit
def sequence_at(sequences, number):
    """Line `number` of the table of sequences."""
    line = sequences + 6 * number
    return Sequence(
        gl.load(line).to(gl.int64),
        gl.load(line + 1),
        gl.load(line + 2),
        gl.load(line + 3),
        gl.load(line + 4),
        gl.load(line + 5),
    )


@gluon.jit
def sequence_of(
    tile, sequences, tiles, queries, row_keys, SIZE: gl.constexpr, REGULAR: gl.constexpr
):
    """Whether a tile has a sequence, its place there, and the sequence."""
    if REGULAR:
        # One sequence per batch item, all of one length: nothing has to be looked up.
        per_row = (queries + SIZE - 1) // SIZE
        batch = (tile // per_row).to(gl.int64)
        return tile >= 0, tile % per_row, Sequence(batch, 0, queries, 0, row_keys, 0)
    number = gl.load(tiles + 2 * tile)
    its = sequence_at(sequences, gl.maximum(number, 0))
    return number >= 0, gl.load(tiles + 2 * tile + 1), its


@gluon.jit
def span_of(
    tile, head, heads, t0, t1, window_first, window, offsets, counts, listed,
):  # fmt: skip
    """The items of a tile, see the module's head, and its own list."""
    one = tile * heads + head
    base = gl.load(offsets + one)
    room = (gl.load(offsets + one + 1) - base).to(gl.int32)
    front = gl.load(counts + 2 * one)
    back = gl.load(counts + 2 * one + 1)
    low = gl.maximum(window_first, t0 - window + 1)
    first_near = gl.minimum(gl.maximum(t1 - window, low), t1)
    near = gl.maximum(t0 + 1 - first_near, 0)
    ramp = first_near - low
    total = near + front + back + ramp + t1 - (first_near + near)
    return Span(near, first_near, front, back, room, low, ramp, total, t0, t1), listed + base


@gluon.jit
def items(span, BN: gl.constexpr):
    """Steps that need no mask, and all steps."""
    return (span.near + span.front) // BN, (span.total + BN - 1) // BN


@gluon.jit
def in_tile(first, stop, t0, t1):
    """Queries [first, stop) as places in the tile, in one word."""
    count = t1 - t0
    first = gl.minimum(gl.maximum(first - t0, 0), count)
    return first + gl.minimum(gl.maximum(stop - t0, 0), count) * 65536


@gluon.jit
def masked_keys(step, lane, span, end, window, listed, BN: gl.constexpr):
    """Keys [BN] of any step, and who sees them: queries [a, b) of the tile, as a + 65536 b."""
    item = step * BN + lane
    at = item - span.near
    front = span.front
    listed_keys = front + span.back
    is_selected = (at >= 0) & (at < listed_keys)
    at = gl.where(at < front, at, span.room - span.back + at - front)
    key = gl.load(listed + at, mask=is_selected, other=0)
    stop = gl.load(end + key, mask=is_selected, other=0)
    place = item - (span.near + listed_keys)
    after = span.first_near + span.near + place - span.ramp
    other = gl.where(place < span.ramp, span.low + place, after)
    other = gl.where(item < span.near, span.first_near + item, other)
    key = gl.where(is_selected, key, other)
    begin = gl.where(is_selected, key + window, key)
    stop = gl.where(is_selected, stop, key + window)
    stop = gl.where(item < span.total, stop, 0)
    return gl.minimum(key, span.t1 - 1), in_tile(begin, stop, span.t0, span.t1)


@gluon.jit
def copy_rows(base, key, stride, d, to, WIDE: gl.constexpr):
    if WIDE:
        key = key.to(gl.int64)
    async_copy.async_copy_global_to_shared(to, base + (key * stride)[:, None] + d[None, :])


@gluon.jit
def rows_at(
    base, first_query, first_head, first_row, count, stride_n, stride_h,
    HG: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Addresses [64, D] of a consumer's rows and which of them exist (`count` queries do)."""
    LINE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    item = first_row + gl.arange(0, HALF, layout=gl.SliceLayout(1, LINE))
    d = gl.arange(0, D, layout=gl.SliceLayout(0, LINE))
    query = (first_query + item // HG).to(gl.int64)
    head = (first_head + item % HG).to(gl.int64)
    at = (base + query * stride_n + head * stride_h)[:, None] + d[None, :]
    return at, gl.expand_dims(item // HG < count, 1)


@gluon.jit
def thread_sums(weights, BN: gl.constexpr):
    """[64, 4]: row sums up to the four threads that share a row."""
    return gl.sum(gl.sum(gl.reshape(weights, [HALF, BN // 8, 4, 2]), 3), 1)


@gluon.jit
def within(ranges, t, COLUMN: gl.constexpr):
    """[64, BN]: whether the place t of a row lies in the column's [a, b), kept as a + 65536 b."""
    word = ranges.load(COLUMN)
    return (t[:, None] >= (word & 65535)[None, :]) & (t[:, None] < (word >> 16)[None, :])


def heads_of_tile(group: int) -> int:
    """Heads of one group that share a tile: a power of two that divides the group."""
    return min(4, group & -group)
