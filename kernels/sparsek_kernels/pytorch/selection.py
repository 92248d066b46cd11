"""Prefix selection: for every key, the query at which it stops being one of the k best."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsek_kernels.keys import NEVER, KeyList, candidates
from sparsek_kernels.state import EMPTY, SlotLayout

CHUNK = 1024  # candidates looked at together; most are beaten at once and cost one comparison
CONTENDERS = 128  # contenders settled together by an all-pairs comparison


def compress(mask: Tensor, width: int) -> Tensor:
    """Columns of the True elements, in order, padded with the row length.

    Args:
        mask: [R, C] bool with at most `width` True per row.

    Returns:
        [R, width] int64.
    """
    rows, columns = mask.shape
    out = mask.new_full((rows, width + 1), columns, dtype=torch.int64)
    rank = mask.cumsum(1).sub_(1).masked_fill_(~mask, width)
    out.scatter_(1, rank, torch.arange(columns, device=mask.device).expand(rows, -1))
    return out[:, :width]


def prefix_topk(candidates: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Exact top-k of every prefix, ordered by (score, then the earlier token wins).

    A key that leaves the set never returns (docs/method.md: the k-th best score of a prefix never
    decreases), so its membership is one run of queries and its end says everything. Chunked:
    only candidates above the smallest kept score contend, and of the kept ones only as many
    of the smallest as there are contenders can leave.

    Args:
        candidates: [R, N] float64; candidate i joins at query i. -inf marks none.
        kept: [R, K] float64, the set before query 0, earlier tokens first. K is the capacity:
            -inf is a free slot, +inf a slot that this row does not have (heads of smaller k).

    Returns:
        (end of candidates [R, N], end of kept [R, K]), int32 in 0..N: candidate i is selected
        for queries [i, end), never if end == i; N means still selected after the last query.
    """
    rows, n = candidates.shape
    slots = kept.shape[1]
    device = candidates.device
    end = torch.empty(rows, slots + n + 1, dtype=torch.int32, device=device)
    end[:, :slots] = n
    end[:, slots:] = torch.arange(n + 1, dtype=torch.int32, device=device)
    if slots and n and rows:
        if int((kept == -torch.inf).sum(1).min()) >= n:
            end[:, slots:-1].masked_fill_(candidates > -torch.inf, n)  # room for all of them
        else:
            _settle(candidates, kept, end)
    return end[:, slots:-1], end[:, :slots]


def _settle(candidates: Tensor, kept: Tensor, end: Tensor) -> None:
    rows, n = candidates.shape
    slots = kept.shape[1]
    kept, ids = kept.sort(dim=1, descending=True, stable=True)
    for begin in range(0, n, CHUNK):
        chunk = candidates[:, begin : begin + CHUNK]
        contends = chunk > kept[:, -1:]
        width = int(contends.sum(1).max())
        if width == 0:
            continue
        columns = compress(contends, width)
        absent = columns == chunk.shape[1]
        values = chunk.gather(1, columns.masked_fill(absent, 0)).masked_fill_(absent, -torch.inf)
        arrival = (columns + begin).masked_fill_(absent, n)
        for a in range(0, width, CONTENDERS):
            part = slice(a, a + CONTENDERS)
            kept, ids = _step(kept, ids, values[:, part], arrival[:, part], end, slots)


def _step(
    kept: Tensor, ids: Tensor, new: Tensor, arrival: Tensor, end: Tensor, slots: int
) -> tuple[Tensor, Tensor]:
    """One merge of contenders into the kept set (descending, ties: earlier first)."""
    n = end.shape[1] - slots - 1
    width = new.shape[1]
    small = min(width, slots)
    weakest = kept[:, slots - small :]
    # An element leaves when as many newcomers beat it as there are kept ones it beats (itself
    # included if it is one of them). A newcomer above all `small` of them cannot leave here.
    need_kept = torch.arange(small, 0, -1, device=new.device).expand(new.shape[0], -1)
    need_new = torch.searchsorted(weakest.flip(1).contiguous(), new.contiguous())
    earlier = torch.ones(width, width, dtype=torch.bool, device=new.device).tril(-1)
    beats_kept = new[:, None, :] > weakest[:, :, None]
    beats_new = new[:, None, :] > new[:, :, None]
    beats_new |= (new[:, None, :] == new[:, :, None]) & earlier
    beaten = torch.cat([beats_kept, beats_new], 1).cumsum(2, dtype=torch.int32)
    need = torch.cat([need_kept, need_new], 1)
    leaves = (beaten < need[:, :, None]).sum(2)
    when = torch.cat([arrival, arrival.new_full((arrival.shape[0], 1), n)], 1).gather(1, leaves)
    when[:, small:] = torch.maximum(when[:, small:], arrival)
    new_ids = slots + arrival  # absent ones go to the spare last column
    end.scatter_(1, torch.cat([ids[:, slots - small :], new_ids], 1), when.to(torch.int32))
    merged, order = torch.cat([kept, new], 1).sort(dim=1, descending=True, stable=True)
    return merged[:, :slots].contiguous(), torch.cat([ids, new_ids], 1).gather(1, order)[:, :slots]


def select(keys: KeyList, layout: SlotLayout) -> Tensor:
    """`end` [B, G, M] int32: the first query that no longer sees each key."""
    batch, heads, m = keys.effective.shape
    device = keys.effective.device
    topk = torch.tensor(layout.topk, device=device)
    capacity = keys.slots or min(max(layout.topk), keys.n)
    missing = torch.arange(capacity, device=device) >= topk[:, None]
    if keys.slots:
        kept = keys.effective.detach()[:, :, layout.sinks : layout.sinks + capacity]
    else:
        kept = keys.effective.new_full((batch, heads, capacity), -torch.inf).detach()
    kept = kept.masked_fill(missing, torch.inf)
    joins = candidates(keys, layout)
    ends, kept_ends = prefix_topk(joins.flatten(0, 1), kept.flatten(0, 1))
    end = torch.full((batch, heads, m), keys.n, dtype=torch.int32, device=device)
    if keys.base >= 0:
        end[:, :, keys.base : keys.base + keys.n] = ends.view(batch, heads, -1)
        end[:, :, layout.sinks : keys.base] = kept_ends.view(batch, heads, -1)
    elif keys.n > layout.window:
        end[:, :, : keys.n - layout.window] = ends.view(batch, heads, -1)[:, :, layout.window :]
    end = end.masked_fill(keys.effective.detach() == torch.inf, keys.n)
    return end.masked_fill(keys.positions == EMPTY, NEVER)
