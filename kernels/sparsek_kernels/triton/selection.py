"""Scores -> when each key leaves the selected set, exactly, for every prefix at once.

Key j is a candidate from query j + window on, and stays selected until k better candidates exist.
With keys taken in rank order (best first), "k better candidates exist" happens when the k-th
smallest position among the better-ranked keys becomes a candidate. So the end of every key is one
running statistic of one stream: the k-th smallest position among the ranks before its own
(derived). The stream is cut into chunks of `CHUNK` ranks:

1. one stable sort gives the ranks (score, then the earlier token wins);
2. a histogram (chunk x position bucket) and its running sum place the statistic at each chunk
   boundary in a bucket, and a scan of that bucket makes it exact;
3. inside a chunk only the positions between two neighbouring boundaries can matter, and at most
   CHUNK of them carry a better rank: pairwise comparisons finish the job.

Work is O(N log N) for the sort plus O(N) with small constants; memory 32 bytes per key and head
beyond the sort's own buffers.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from sparsek_kernels.triton.documents.tables import segment_tables
from sparsek_kernels.triton.effective import effective_score, places_in_documents
from sparsek_kernels.triton.geometry import Geometry, head_budgets, ragged_index
from sparsek_kernels.triton.launches.launch import launch
from sparsek_kernels.triton.ranks import rank_order

CHUNK = 64  # ranks resolved by one program
BUCKETS = 256  # position buckets of the histogram
FOREVER = 2**31 - 1  # `end` of a key that is never evicted


@triton.jit
def _histogram(order, chunks, segments, table, shift, CHUNK: tl.constexpr, BUCKETS: tl.constexpr):
    """Counts positions per bucket: line 0 of a segment holds its first k ranks, line c chunk c."""
    line = tl.program_id(0)
    segment = tl.load(chunks + 2 * line)
    if segment < 0:
        return
    chunk = tl.load(chunks + 2 * line + 1)
    first = tl.load(segments + 3 * segment)
    size = tl.load(segments + 3 * segment + 1)
    k = tl.load(segments + 3 * segment + 2)
    low = tl.where(chunk == 0, 0, k + (chunk - 1) * CHUNK)
    high = tl.minimum(k + chunk * CHUNK, size)
    for start in range(low, high, CHUNK):
        rank = start + tl.arange(0, CHUNK)
        inside = rank < high
        key = tl.load(order + first + rank, mask=inside, other=0)
        bucket = (key - first) >> shift
        where = table + line.to(tl.int64) * BUCKETS + bucket
        tl.atomic_add(where, 1, mask=inside, sem="relaxed")


@triton.jit
def _running_sum(table, lines, BLOCK: tl.constexpr, WIDTH: tl.constexpr, BUCKETS: tl.constexpr):
    """Makes every line of a segment's histogram the sum of the lines up to it, in place."""
    segment = tl.program_id(0)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    low = tl.load(lines + segment)
    high = tl.load(lines + segment + 1)
    carry = tl.zeros([WIDTH], tl.int32)
    for start in range(low, high, BLOCK):
        line = start + tl.arange(0, BLOCK)
        where = table + line.to(tl.int64)[:, None] * BUCKETS + column[None, :]
        inside = (line < high)[:, None]
        block = tl.load(where, mask=inside, other=0)
        tl.store(where, tl.cumsum(block, 0) + carry[None, :], mask=inside)
        carry += tl.sum(block, 0)


@triton.jit
def _boundaries(
    rank, chunks, segments, table, bound, shift,
    CHUNK: tl.constexpr, BUCKETS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """bound[line] = k-th smallest key index among the ranks before the end of the line's chunk."""
    line = tl.program_id(0)
    segment = tl.load(chunks + 2 * line)
    if segment < 0:
        return
    chunk = tl.load(chunks + 2 * line + 1)
    first = tl.load(segments + 3 * segment)
    size = tl.load(segments + 3 * segment + 1)
    k = tl.load(segments + 3 * segment + 2)
    if k == 0:
        tl.store(bound + line, -1)
        return
    limit = first + tl.minimum(k + chunk * CHUNK, size)
    lane = tl.arange(0, BUCKETS)
    counts = tl.load(table + line.to(tl.int64) * BUCKETS + lane)
    sums = tl.cumsum(counts, 0)
    bucket = tl.sum((sums < k).to(tl.int32), 0)
    need = k - tl.sum(tl.where(lane < bucket, counts, 0), 0)
    low = bucket << shift
    high = tl.minimum(low + (1 << shift), size)
    found = tl.zeros([BLOCK], tl.int32)
    before = 0
    for start in range(low, high, BLOCK):
        key = first + start + tl.arange(0, BLOCK)
        inside = start + tl.arange(0, BLOCK) < high
        better = (tl.load(rank + key, mask=inside, other=FOREVER_) < limit).to(tl.int32)
        running = tl.cumsum(better, 0) + before
        found += tl.where((better != 0) & (running == need), key, 0)
        before += tl.sum(better, 0)
    tl.store(bound + line, tl.sum(found, 0))


FOREVER_ = tl.constexpr(FOREVER)


@triton.jit
def _ends(
    order, rank, flat, chunks, segments, bound, scratch, end, row_keys, window,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """end[key] for the candidates of one chunk of ranks; 0 means never selected."""
    line = tl.program_id(0)
    segment = tl.load(chunks + 2 * line)
    if segment < 0:
        return
    chunk = tl.load(chunks + 2 * line + 1)
    if chunk == 0:
        return
    first = tl.load(segments + 3 * segment)
    size = tl.load(segments + 3 * segment + 1)
    k = tl.load(segments + 3 * segment + 2)
    low_rank = k + (chunk - 1) * CHUNK
    limit = tl.minimum(low_rank + CHUNK, size)
    high = tl.load(bound + line - 1)
    low = tl.load(bound + line)
    # The better-ranked keys between the two boundaries, in position order; at most CHUNK of them.
    mine = scratch + line.to(tl.int64) * CHUNK
    kept = 0
    for start in range(low, high, BLOCK):
        key = start + tl.arange(0, BLOCK)
        inside = (key < high) & (key >= 0)
        better = (tl.load(rank + key, mask=inside, other=FOREVER_) < first + limit).to(tl.int32)
        slot = kept + tl.cumsum(better, 0) - better
        tl.store(mine + slot, key, mask=(better != 0) & (slot < CHUNK))
        kept += tl.sum(better, 0)
    tl.debug_barrier()  # the list is read back by other threads of this program
    lane = tl.arange(0, CHUNK)
    kept = tl.minimum(kept, CHUNK)
    listed = tl.load(mine + lane, mask=lane < kept, other=FOREVER_)
    arriving = low_rank + lane
    key = tl.load(order + first + arriving, mask=arriving < limit, other=FOREVER_)
    statistic = tl.zeros([CHUNK], tl.int32) + high
    if kept > 0:
        # later[i, m]: keys that arrive at rank i or later and lie at or before listed key m.
        # Before rank i, the listed key m has k + m - later[i, m] better keys at or before it.
        below = (key[:, None] <= listed[None, :]) & (arriving < limit)[:, None]
        below = below.to(tl.int32)
        later = tl.sum(below, 0)[None, :] - tl.cumsum(below, 0) + below
        enough = (lane[None, :] >= later) & (lane < kept)[None, :]
        statistic = tl.min(tl.where(enough, listed[None, :], high), 1)
    leaves = tl.where(statistic > key, statistic - (key // row_keys) * row_keys + window, 0)
    candidate = tl.load(flat + key, mask=arriving < limit, other=-float("inf")) > -float("inf")
    tl.store(end + key, leaves, mask=candidate)


@triton.jit(do_not_specialize=("count", "steps", "keys", "row_b"))
def _sort_out(
    scores, slopes, sequences, always, never, flat, end, count, steps, heads, keys,
    row_b, head_b, step, always_row, always_head, never_row, never_head,
    SLOPED: tl.constexpr, PACKED: tl.constexpr, ALWAYS: tl.constexpr, NEVER: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The candidates' effective scores, -inf for other keys; and `end` where none is evicted."""
    line = tl.program_id(1)
    row, head = (line // heads).to(tl.int64), (line % heads).to(tl.int64)
    key = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = key < keys
    at = line.to(tl.int64) * keys + key
    place, slope = key, 0.0
    if SLOPED:
        slope = tl.load(slopes + head)
        place = places_in_documents(sequences, key, inside, count, steps, PACKED)
    given = scores + row * row_b + head * head_b + key.to(tl.int64) * step
    score = effective_score(tl.load(given, mask=inside, other=0), slope, place, SLOPED)
    score = score + 0.0  # a radix sort would tell -0.0 from 0.0
    leaves = tl.where(score == -float("inf"), 0, FOREVER_)
    if ALWAYS:
        one = tl.load(always + row * always_row + head * always_head + key, mask=inside, other=0)
        leaves = tl.where(one != 0, FOREVER_, leaves)
        score = tl.where(one != 0, -float("inf"), score)
    if NEVER:
        one = tl.load(never + row * never_row + head * never_head + key, mask=inside, other=0)
        leaves = tl.where(one != 0, 0, leaves)
        score = tl.where(one != 0, -float("inf"), score)
    tl.store(flat + at, score, mask=inside)
    tl.store(end + at, leaves, mask=inside)


def selection_ends(
    scores: torch.Tensor,
    topk: Sequence[int],
    window: int,
    geometry: Geometry,
    *,
    slopes: torch.Tensor | None = None,
    always: torch.Tensor | None = None,
    never: torch.Tensor | None = None,
) -> torch.Tensor:
    """int32 [B, G, M]: key j is selected for the queries j + window <= t < end.

    Args:
        scores: [B, G, M] of any floating dtype and strides: effective ones, or u_j, to which
            `slopes` are added; -inf and NaN are never selected.
        topk: budget of each KV head, G numbers >= 0.
        slopes: [G], added as slope * place in the sequence; None: nothing is added.
        always, never: bool, broadcastable to [B, G, M]: sinks (end `FOREVER`) and empty slots of a
            state (end 0); neither is a candidate.
    """
    scores = scores.detach()
    batch, heads, keys = scores.shape
    flat = torch.empty(scores.shape, dtype=torch.float64, device=scores.device)
    end = torch.empty(scores.shape, dtype=torch.int32, device=scores.device)
    masks = [None if mask is None else mask.expand(scores.shape) for mask in (always, never)]
    # Views, so that a mask of all rows or heads is read where it stands.
    strides = [(0, 0) if mask is None else mask.stride()[:2] for mask in masks]
    launch(
        _sort_out, (triton.cdiv(keys, 1024), batch * heads),
        scores, scores if slopes is None else slopes, geometry.sequences,
        *(end if mask is None else mask for mask in masks), flat, end,
        geometry.count, geometry.count.bit_length(), heads, keys,
        *scores.stride(), *strides[0], *strides[1],
        SLOPED=slopes is not None, PACKED=geometry.packed,
        ALWAYS=always is not None, NEVER=never is not None, BLOCK=1024, num_warps=4,
        enable_fp_fusion=False,
    )  # fmt: skip
    if min(topk) < geometry.longest and max(topk) >= 0:
        _resolve(flat, topk, window, geometry, end)
    return end


def _resolve(scores, topk, window, geometry, end) -> None:
    """`end` of candidates that are evicted; scores [B, G, M], -inf for what is no candidate."""
    order, rank = rank_order(scores, geometry)
    segments, chunks, lines = _segment_tables(geometry, tuple(topk), scores.device)
    count = chunks.shape[0]
    shift = max(0, (geometry.longest - 1).bit_length() - (BUCKETS - 1).bit_length())
    device = scores.device
    table = torch.zeros(count, BUCKETS, dtype=torch.int32, device=device)
    bound = torch.empty(count, dtype=torch.int32, device=device)
    launch(
        _histogram, (count,),
        order, chunks, segments, table, shift, CHUNK=CHUNK, BUCKETS=BUCKETS, num_warps=4,
    )  # fmt: skip
    launch(
        _running_sum, (segments.shape[0], BUCKETS // 32),
        table, lines, BLOCK=64, WIDTH=32, BUCKETS=BUCKETS, num_warps=4,
    )  # fmt: skip
    launch(
        _boundaries, (count,),
        rank, chunks, segments, table, bound, shift,
        CHUNK=CHUNK, BUCKETS=BUCKETS, BLOCK=1024, num_warps=4,
    )  # fmt: skip
    scratch = torch.empty(count, CHUNK, dtype=torch.int32, device=device)
    launch(
        _ends, (count,),
        order, rank, scores, chunks, segments, bound, scratch, end, geometry.keys, window,
        CHUNK=CHUNK, BLOCK=1024, num_warps=4,
    )  # fmt: skip


_TABLES: dict[tuple, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}


def _segment_tables(geometry: Geometry, topk: tuple[int, ...], device: torch.device):
    """Segments int32 [S*G, 3] (first flat key, keys, k), chunks int32 [L, 2], lines int32 [S*G+1].

    A line is one chunk of ranks; line 0 of a segment stands for its first k ranks. Segments with at
    most k keys have no line: nothing is ever evicted there.
    """
    per_head = [-(-max(0, geometry.longest - k) // CHUNK) for k in topk]
    if geometry.packed:
        total = sum(per_head) + geometry.heads * 2 * geometry.count
        budgets = head_budgets(topk, device)
        return segment_tables(geometry.sequences, budgets, geometry.keys, total, CHUNK)
    key = (geometry.batch, geometry.heads, geometry.keys, topk, device)
    if key not in _TABLES:
        if len(_TABLES) > 256:
            _TABLES.clear()
        total = geometry.batch * sum(n + 1 for n in per_head if n)
        _TABLES[key] = plain_segment_tables(geometry, topk, total, device)
    return _TABLES[key]


def plain_segment_tables(
    geometry: Geometry, topk: tuple[int, ...], total: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `_segment_tables`; of `total` lines of chunks, an upper bound."""
    sequence = geometry.sequences
    head = torch.arange(geometry.heads, device=device, dtype=torch.int32)
    row = sequence[:, :1] * geometry.heads + head
    first = row * geometry.keys + sequence[:, 3:4]
    size = sequence[:, 4:5].expand_as(first)
    k = head_budgets(topk, device).expand_as(first)
    segments = torch.stack((first, size, k), dim=-1).reshape(-1, 3).to(torch.int32).contiguous()
    left = (size - k).clamp(min=0).reshape(-1)
    counts = torch.where(left > 0, (left + CHUNK - 1) // CHUNK + 1, 0)
    lines = torch.zeros(counts.shape[0] + 1, dtype=torch.int32, device=device)
    lines[1:] = counts.cumsum(0)
    return segments, ragged_index(counts, total), lines
