"""Pairs that stand in for what a query no longer sees join what the attention kernels found.

A query's output and log-sum are all that is needed of the pairs that it sees. With the joined
log-sum the kernels of the backward pass need to know nothing of stand-ins: what these give to the
gradient of queries is added to theirs.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sparsek_kernels.triton.geometry import Geometry, head_budgets
from sparsek_kernels.triton.launches.launch import launch
from sparsek_kernels.triton.lists import KeyLists
from sparsek_kernels.triton.tiles import LOG2_E, load_rows, sequence_at, strides, tile_of

ROWS = 64  # queries that a program looks at together, at most
TILE = 8192  # numbers of these in registers
PARTS = 64  # programs of a query head that sum the gradient of its pairs
_LOG2_E = tl.constexpr(LOG2_E)


class StandIns(NamedTuple):
    """What one call knows of its stand-ins.

    Attributes:
        pairs: [H, M, 2 D + 2], key, value, bias and limit of each, dense.
        topk, extra: selected pairs of each KV head; sinks and window.
        places: int64 [B, G, M] of keys that were listed from a state, a query's own among them;
            None where each sequence begins at its first key.
    """

    pairs: torch.Tensor
    topk: tuple[int, ...]
    extra: int
    places: torch.Tensor | None = None


@triton.jit
def log2_missing(place, slots):
    """log2 of how many of the tokens up to `place` do not fit; -inf where all do."""
    missing = place + 1 - slots
    return tl.where(missing > 0, tl.log2(tl.maximum(missing, 1).to(tl.float32)), -float("inf"))


@triton.jit
def _missing(places, its, at, row_keys, slots, LISTED: tl.constexpr):
    """`log2_missing` of a tile's rows."""
    if LISTED:
        place = tl.load(places + at.row * row_keys + at.t, mask=at.inside, other=0)
    else:
        place = at.t - its.first_key
    return log2_missing(place, slots)


@triton.jit
def _tile(sequences, tiles, tile, heads, group, queries, SIZE: tl.constexpr, BQ: tl.constexpr):
    """(its sequence, tile `tile` of BQ queries of one query head, [BQ] rows that are there)."""
    per_list: tl.constexpr = SIZE // BQ
    number = tl.load(tiles + 2 * (tile // per_list))
    place = tl.load(tiles + 2 * (tile // per_list) + 1)
    its = sequence_at(sequences, tl.maximum(number, 0))
    at = tile_of(its, place * SIZE + tile % per_list * BQ, heads, group, queries, BQ, 1)
    return its, at, at.inside & (number >= 0)


@triton.jit
def _join_stand_ins(
    q, out, lse, pairs, places, budgets, sequences, tiles,
    q_b, q_h, q_n, o_b, o_h, o_n, heads, group, queries, row_keys, extra, scale,
    SIZE: tl.constexpr, BQ: tl.constexpr, M: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    LISTED: tl.constexpr,
):  # fmt: skip
    """Stand-ins of one query head into out and lse of a tile of queries."""
    its, at, inside = _tile(sequences, tiles, tl.program_id(0), heads, group, queries, SIZE, BQ)
    slots = tl.load(budgets + at.head) + extra
    missing = _missing(places, its, at, row_keys, slots, LISTED)
    some = inside & (missing > -float("inf"))
    if tl.max(some.to(tl.int32), 0) == 0:
        return
    d = tl.arange(0, DP)
    real = d < D
    rows = load_rows(q, at.batch * q_b + at.query * q_n + at.q_head * q_h, d, some, D, DP, True)
    rows = rows.to(tl.float32)
    o_at = out + at.batch * o_b + at.query * o_n + at.q_head * o_h
    mask = some[:, None] & real[None, :]
    acc = tl.load(o_at[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
    total = tl.load(lse + at.stat, mask=some, other=0.0)
    pair = pairs + tl.program_id(1).to(tl.int64) * (M * (2 * D + 2))
    for _ in tl.static_range(M):
        key = tl.load(pair + d, mask=real, other=0.0).to(tl.float32)
        value = tl.load(pair + D + d, mask=real, other=0.0).to(tl.float32)
        bias = tl.load(pair + 2 * D).to(tl.float32) * _LOG2_E
        limit = tl.load(pair + 2 * D + 1).to(tl.float32) * _LOG2_E
        logit = tl.sum(rows * key[None, :], 1) * scale + bias + tl.minimum(missing, limit)
        top = tl.maximum(total, logit)
        kept, own = tl.exp2(total - top), tl.exp2(logit - top)
        share = own / (kept + own)
        acc += share[:, None] * (value[None, :] - acc)
        total = top + tl.log2(kept + own)
        pair += 2 * D + 2
    tl.store(o_at[:, None] + d[None, :], acc.to(out.dtype.element_ty), mask=mask)
    tl.store(lse + at.stat, total, mask=some)


@triton.jit
def _stand_in_gradient(
    q, do, dq, lse, delta, pairs, sums, places, budgets, sequences, tiles,
    q_b, q_h, q_n, do_b, do_h, do_n, dq_b, dq_h, dq_n,
    heads, group, queries, row_keys, extra, scale, count,
    SIZE: tl.constexpr, BQ: tl.constexpr, M: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    LISTED: tl.constexpr,
):  # fmt: skip
    """What one stand-in gives to dq of its queries, and one of the sums of its own gradient.

    sums: float32 [parts, H, M, 2 D + 2]. scale: of logits to the base e; lse is to the base 2.
    """
    d = tl.arange(0, DP)
    real = d < D
    q_head = tl.program_id(1).to(tl.int64)
    row: tl.constexpr = 2 * D + 2
    for m in tl.static_range(M):
        pair = pairs + (q_head * M + m) * row
        key = tl.load(pair + d, mask=real, other=0.0).to(tl.float32)
        value = tl.load(pair + D + d, mask=real, other=0.0).to(tl.float32)
        bias = tl.load(pair + 2 * D).to(tl.float32)
        limit = tl.load(pair + 2 * D + 1).to(tl.float32) * _LOG2_E
        d_key = tl.zeros([DP], tl.float32)
        d_value = tl.zeros([DP], tl.float32)
        d_bias = 0.0
        for tile in range(tl.program_id(0), count, tl.num_programs(0)):
            its, at, inside = _tile(sequences, tiles, tile, heads, group, queries, SIZE, BQ)
            slots = tl.load(budgets + at.head) + extra
            missing = _missing(places, its, at, row_keys, slots, LISTED)
            some = inside & (missing > -float("inf"))
            if tl.max(some.to(tl.int32), 0) > 0:
                where = at.batch * q_b + at.query * q_n + at.q_head * q_h
                rows = load_rows(q, where, d, some, D, DP, True).to(tl.float32)
                where = at.batch * do_b + at.query * do_n + at.q_head * do_h
                grad = load_rows(do, where, d, some, D, DP, True).to(tl.float32)
                logit = (tl.sum(rows * key[None, :], 1) * scale + bias) * _LOG2_E
                logit += tl.minimum(missing, limit)
                total = tl.load(lse + at.stat, mask=some, other=0.0)
                weight = tl.where(some, tl.exp2(logit - total), 0.0)
                own = tl.sum(grad * value[None, :], 1)
                ds = weight * (own - tl.load(delta + at.stat, mask=some, other=0.0))
                where = dq + at.batch * dq_b + at.query * dq_n + at.q_head * dq_h
                mask = some[:, None] & real[None, :]
                old = tl.load(where[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
                new = old + (ds * scale)[:, None] * key[None, :]
                tl.store(where[:, None] + d[None, :], new.to(dq.dtype.element_ty), mask=mask)
                d_key += tl.sum(rows * (ds * scale)[:, None], 0)
                d_value += tl.sum(grad * weight[:, None], 0)
                d_bias += tl.sum(ds, 0)
        part = sums + ((tl.program_id(0) * heads * group + q_head) * M + m) * row
        tl.store(part + d, d_key, mask=real)
        tl.store(part + D + d, d_value, mask=real)
        tl.store(part + 2 * D, d_bias)
        tl.store(part + 2 * D + 1, 0.0)  # limits are given


def _shared(given: StandIns, q: torch.Tensor, lists: KeyLists) -> dict:
    """What both kernels are compiled for."""
    dim = q.shape[3]
    padded = max(16, triton.next_power_of_2(dim))
    return dict(
        SIZE=lists.size, BQ=min(ROWS, lists.size, TILE // padded), M=given.pairs.shape[1], D=dim,
        DP=padded, LISTED=given.places is not None, num_warps=4,
    )  # fmt: skip


def _tables(given: StandIns, lists: KeyLists, shape: Geometry) -> tuple[torch.Tensor, ...]:
    places = shape.sequences if given.places is None else given.places
    budgets = head_budgets(given.topk, shape.sequences.device)
    return places, budgets, shape.sequences, lists.tiles


def join_stand_ins(
    q: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, given: StandIns, lists: KeyLists,
    shape: Geometry, scale: float,
) -> None:  # fmt: skip
    """out [B, H, N, D] and lse float32 [B, H, N] (base 2) with stand-ins in the softmax, in place.

    Args:
        q: [B, H, N, D], its last dimension dense, as out's. lists: of any tiles of the queries.
    """
    options = _shared(given, q, lists)
    count = lists.tiles.shape[0] * (lists.size // options["BQ"])
    launch(
        _join_stand_ins, (count, q.shape[1]),
        q, out, lse, given.pairs, *_tables(given, lists, shape), *strides(q), *strides(out),
        shape.heads, shape.group, shape.queries, shape.keys, given.extra, scale * LOG2_E, **options,
    )  # fmt: skip


def stand_in_gradient(
    q: torch.Tensor, do: torch.Tensor, dq: torch.Tensor, lse: torch.Tensor, delta: torch.Tensor,
    given: StandIns, lists: KeyLists, shape: Geometry, scale: float,
) -> torch.Tensor:  # fmt: skip
    """d(pairs) [H, M, 2 D + 2] in their dtype; adds to dq, in place, what comes through them.

    Args:
        do, dq: as q. lse: with the stand-ins in it. delta: float32 [B, H, N], sums of do * out.
    """
    options = _shared(given, q, lists)
    count = lists.tiles.shape[0] * (lists.size // options["BQ"])
    parts = min(PARTS, count)
    sums = torch.empty(parts, *given.pairs.shape, dtype=torch.float32, device=q.device)
    launch(
        _stand_in_gradient, (parts, q.shape[1]),
        q, do, dq, lse, delta, given.pairs, sums, *_tables(given, lists, shape),
        *strides(q), *strides(do), *strides(dq),
        shape.heads, shape.group, shape.queries, shape.keys, given.extra, scale, count, **options,
    )  # fmt: skip
    return sums.sum(0).to(given.pairs.dtype)
