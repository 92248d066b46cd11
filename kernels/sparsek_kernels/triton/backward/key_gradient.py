"""Gradient of keys and values, walked key by key.

Two launches of one kernel. The window first: a tile of neighbouring keys loops over the queries
whose window holds them and stores dK, dV (so nothing has to be zeroed). Then the selected keys: a
tile of keys from the list of a super tile (1024 queries) loops over the part of it in which they
are selected and adds its sum. A super tile holds a key once, so the additions of one super tile
never collide: added in super-tile order they are deterministic, added atomically they all run at
once.

The gate gradient dm (method section 3) is summed over the queries of a key here, and over the keys
of a query in `query_gradient.py`; `scores.py` joins both.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sparsek_kernels.triton.geometry import Geometry
from sparsek_kernels.triton.launches.launch import launch
from sparsek_kernels.triton.lists import KeyLists
from sparsek_kernels.triton.tiles import (
    GATES,
    LOG2_E,
    cap_of,
    capped,
    dot_precision,
    load_rows,
    needs_wide_index,
    sequence_at,
    strides,
)
from sparsek_kernels.triton.tuning import Config

_LOG = tl.constexpr(1)
_KV = tl.constexpr(2)
_LN_2 = tl.constexpr(0.6931471805599453)
_FAR = tl.constexpr(2**31 - 1)


@triton.jit
def _key_gradient_step(
    block, head_in_group, k, v, dk, dv, column_sum,
    q_base, do_base, lse_base, delta_base, tau_base,
    q_h, q_n, do_h, do_n, stat_h, d, t0, t1, scale, cap,
    begin, stop, run_low, run_high, gate_score, centre,
    BQ: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, GATE: tl.constexpr, CAPPED: tl.constexpr,
    MASKED: tl.constexpr, SCORES: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the queries of one block and head to dK and dV of a tile of keys (rows = keys)."""
    t = t0 + block * BQ + tl.arange(0, BQ)
    at = (t - t0).to(tl.int64)
    inside = t < t1
    q = load_rows(q_base + head_in_group * q_h, at * q_n, d, inside, D, DP, MASKED)
    do = load_rows(do_base + head_in_group * do_h, at * do_n, d, inside, D, DP, MASKED)
    stat = head_in_group * stat_h + at
    if MASKED:
        lse = tl.load(lse_base + stat, mask=inside, other=float("inf"))
        delta = tl.load(delta_base + stat, mask=inside, other=0.0)
    else:
        lse = tl.load(lse_base + stat)
        delta = tl.load(delta_base + stat)
    raw = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
    if CAPPED:
        raw = capped(raw, cap)
    logits = raw
    if GATE != 0 and not WINDOW:
        tau = tl.load(tau_base + at, mask=inside, other=-float("inf"))
        tau_row = tl.where(tau > -1.0e300, tau - centre, -1.0e30).to(tl.float32)
        gate = tl.minimum(tl.maximum(gate_score[:, None] - tau_row[None, :], 0.0), 1.0)
        logits = raw + tl.log2(gate) if GATE == _LOG else raw * gate
    if MASKED:
        visible = (t[None, :] >= begin[:, None]) & (t[None, :] < stop[:, None])
        logits = tl.where(visible, logits, -float("inf"))
    weights = tl.exp2(logits - lse[None, :])
    if GATE == _KV and not WINDOW:
        dv = tl.dot((weights * gate).to(do.dtype), do, dv, input_precision=PRECISION)
    else:
        dv = tl.dot(weights.to(do.dtype), do, dv, input_precision=PRECISION)
    weighted = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    if GATE == _KV and not WINDOW:
        ds = weights * (weighted * gate - delta[None, :])
        dm = weights * weighted + raw * _LN_2 * ds
        ds = ds * gate
    else:
        ds = weights * (weighted - delta[None, :])
        dm = ds
    if SCORES and not WINDOW:
        if GATE == _LOG:
            bare = tl.where(gate > 0, tl.exp2(raw - lse[None, :]), 0.0)
            dm = bare * (weighted - delta[None, :])
        counted = (t[None, :] >= run_low[:, None]) & (t[None, :] < run_high[:, None])
        if MASKED:
            counted = counted & visible
        column_sum += tl.sum(tl.where(counted, dm, 0.0), 1)
    if CAPPED:
        ds *= 1.0 - (raw / cap) * (raw / cap)
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv, column_sum


class Keys(NamedTuple):
    """Keys of a program, whether they exist, and the queries [begin, stop) that see each.

    All [BN] but t0, t1: the queries that matter to any of them lie in [t0, t1).
    """

    key: tl.tensor
    present: tl.tensor
    begin: tl.tensor
    stop: tl.tensor
    t0: tl.tensor
    t1: tl.tensor


@triton.jit
def _window_keys(start, BN: tl.constexpr, first_key, shift, last, window):
    """Neighbouring keys from `start` on, and the queries whose window holds them."""
    key = start + tl.arange(0, BN)
    present = key < last
    key = tl.where(present, key, first_key)
    stop = tl.where(present, key + window, 0)
    t1 = tl.minimum(start + BN - 1 + window, last)
    return Keys(key, present, key, stop, tl.maximum(start, shift), t1)


@triton.jit
def _listed_keys(item, front, back, offset, listed, ends, window, t0, t1, last):
    """Keys of a super tile's list, and the queries of the tile in which they are selected."""
    base = tl.load(offset)
    room = tl.load(offset + 1) - base
    present = item < front + back
    where = tl.where(item < front, item, room - back + item - front)
    key = tl.load(listed + base + where, mask=present, other=0)
    stop = tl.load(ends + key, mask=present, other=0)
    return Keys(key, present, key + window, stop, t0, tl.minimum(t1, last))


@triton.jit
def _centred(scores, last_tau):
    """The last query's tau, and scores as float32 distances from it.

    That tau is the largest; -inf there means that every gate of the tile is 1.
    """
    value = tl.load(last_tau)
    centre = tl.where(value > -1.0e300, value, 0.0)
    return centre, (tl.load(scores) - centre).to(tl.float32)


class Blocks(NamedTuple):
    """Blocks of BQ queries: [low, high) matter at all; in [clear_low, clear_high) no mask does."""

    low: tl.tensor
    clear_low: tl.tensor
    clear_high: tl.tensor
    high: tl.tensor


@triton.jit
def _blocks_of(begin, stop, present, t0, t1, BQ: tl.constexpr):
    """Blocks, counted from t0, of the queries [begin, stop) of some keys."""
    any_begin = tl.min(tl.where(present, begin, _FAR), 0)
    any_stop = tl.max(stop, 0)
    all_begin = tl.max(tl.where(present, begin, 0), 0)
    all_stop = tl.minimum(tl.min(tl.where(present, stop, _FAR), 0), t1)
    low = tl.maximum(any_begin - t0, 0) // BQ
    high = (tl.maximum(tl.minimum(any_stop, t1) - t0, 0) + BQ - 1) // BQ
    high = tl.maximum(high, low)
    clear_low = tl.minimum(tl.maximum((tl.maximum(all_begin - t0, 0) + BQ - 1) // BQ, low), high)
    clear_high = tl.minimum(tl.maximum(tl.maximum(all_stop - t0, 0) // BQ, clear_low), high)
    return Blocks(low, clear_low, clear_high, high)


@triton.jit
def _write(at, value, mask, FIRST: tl.constexpr, ATOMIC: tl.constexpr):
    """Stores what comes first, adds the rest."""
    if FIRST:
        tl.store(at, value, mask=mask)
    elif ATOMIC:
        tl.atomic_add(at, value, mask=mask, sem="relaxed")
    else:
        tl.store(at, value + tl.load(at, mask=mask, other=0.0), mask=mask)


@triton.jit
def _key_gradient(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, column_ptr,
    gate_scores, tau, run_start, run_stop,
    end, sequences, tiles, offsets, counts, listed,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, do_b, do_h, do_n,
    heads, group, queries, row_keys, window, scale, cap, first_tile, tile_step,
    SIZE: tl.constexpr, BN: tl.constexpr, BQ: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    GATE: tl.constexpr, WINDOW: tl.constexpr, SCORES: tl.constexpr, ATOMIC: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, MASKED_STAGES: tl.constexpr,
    CAPPED: tl.constexpr,
):  # fmt: skip
    """dK, dV (float32 [B, G, M, D], added or stored) and the key sums of dm of a tile of keys."""
    if WINDOW:
        tile = tl.program_id(0)
        part = 0
    else:
        tile = first_tile + tl.program_id(1) * tile_step
        part = tl.program_id(0)
    head = tl.program_id(1) if WINDOW else tl.program_id(2)
    sequence = tl.load(tiles + 2 * tile)
    if sequence < 0:
        return
    place = tl.load(tiles + 2 * tile + 1)
    its = sequence_at(sequences, sequence)
    batch = its.batch
    first_key = its.first_key
    last = first_key + its.keys
    shift = last - its.queries
    row = batch * heads + head
    row_at = row * row_keys
    if WINDOW:
        own = _window_keys(first_key + place * BN, BN, first_key, shift, last, window)
    else:
        one = tile * heads + head
        front = tl.load(counts + 2 * one)
        back = tl.load(counts + 2 * one + 1)
        if part * BN >= front + back:
            return
        item = part * BN + tl.arange(0, BN)
        t0 = shift + place * SIZE
        own = _listed_keys(
            item, front, back, offsets + one, listed, end + row_at, window, t0, t0 + SIZE, last
        )
    key, present, begin, stop, t0, t1 = own
    blocks = _blocks_of(begin, stop, present, t0, t1, BQ)

    d = tl.arange(0, DP)
    q0 = (its.first_query + t0 - shift).to(tl.int64)
    q_head = (head * group).to(tl.int64)
    q_base = q_ptr + batch * q_b + q_head * q_h + q0 * q_n
    do_base = do_ptr + batch * do_b + q_head * do_h + q0 * do_n
    stat = (batch * heads * group + q_head) * queries + q0
    tau_base = tau + row * queries + q0
    # Adding to a 64-bit zero widens arguments that may be compile-time constants.
    stat_h = batch * 0 + queries
    wide_q_h = batch * 0 + q_h
    wide_do_h = batch * 0 + do_h
    centre = 0.0
    gate_score = begin.to(tl.float32)
    if GATE != 0 and not WINDOW:
        centre, gate_score = _centred(gate_scores + row_at + key, tau_base + t1 - 1 - t0)
    run_low = begin
    run_high = begin
    if SCORES and not WINDOW:
        run_low = tl.load(run_start + row_at + key, mask=present, other=0)
        run_high = tl.load(run_stop + row_at + key, mask=present, other=0)
    index = key.to(tl.int64) if WIDE else key
    k_base = k_ptr + batch * k_b + head.to(tl.int64) * k_h
    v_base = v_ptr + batch * v_b + head.to(tl.int64) * v_h
    k = load_rows(k_base, index * k_n, d, present, D, DP, True)
    v = load_rows(v_base, index * v_n, d, present, D, DP, True)
    dk = tl.zeros([BN, DP], tl.float32)
    dv = tl.zeros([BN, DP], tl.float32)
    column_sum = tl.zeros([BN], tl.float32)
    for step in range(blocks.clear_low * group, blocks.clear_high * group):
        dk, dv, column_sum = _key_gradient_step(
            step // group, step % group, k, v, dk, dv, column_sum,
            q_base, do_base, lse_ptr + stat, delta_ptr + stat, tau_base,
            wide_q_h, q_n, wide_do_h, do_n, stat_h, d, t0, t1, scale, cap,
            begin, stop, run_low, run_high, gate_score, centre,
            BQ, D, DP, GATE, CAPPED, False, SCORES, WINDOW, PRECISION,
        )  # fmt: skip
    ramp = blocks.clear_low - blocks.low
    hidden = ramp + blocks.high - blocks.clear_high
    for step in tl.range(0, hidden * group, num_stages=MASKED_STAGES):
        block = step // group
        block = tl.where(block < ramp, blocks.low + block, blocks.clear_high + block - ramp)
        dk, dv, column_sum = _key_gradient_step(
            block, step % group, k, v, dk, dv, column_sum,
            q_base, do_base, lse_ptr + stat, delta_ptr + stat, tau_base,
            wide_q_h, q_n, wide_do_h, do_n, stat_h, d, t0, t1, scale, cap,
            begin, stop, run_low, run_high, gate_score, centre,
            BQ, D, DP, GATE, CAPPED, True, SCORES, WINDOW, PRECISION,
        )  # fmt: skip
    grad_at = ((row_at + key) * D)[:, None] + d[None, :]
    mask = present[:, None] & (d < D)[None, :]
    _write(dk_ptr + grad_at, dk * (scale * _LN_2), mask, WINDOW, ATOMIC)
    _write(dv_ptr + grad_at, dv, mask, WINDOW, ATOMIC)
    if SCORES and not WINDOW:
        _write(column_ptr + row_at + key, column_sum, present, False, ATOMIC)


def key_gradient(
    q, k, v, do, lse, delta, end, lists: KeyLists, geometry: Geometry, *,
    window: int, scale: float, gate: str, config: Config, gate_scores, tau, runs,
    deterministic: bool, softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """dk, dv float32 [B, G, M, D] and, if `runs` is given, the key sums of dm, float32 [B, G, M].

    Args:
        lists: key lists of the super tiles.
        runs: int32 [B, G, M] twice, the queries [start, stop) at which a key is interior.
        deterministic: one launch per super tile instead of atomics.
    """
    dk = torch.empty(k.shape, dtype=torch.float32, device=k.device)
    dv = torch.empty(v.shape, dtype=torch.float32, device=k.device)
    if geometry.keys != geometry.queries:
        dk.zero_()  # slots before the first query have no window tile of their own
        dv.zero_()
    sums = None
    if runs is not None:
        sums = torch.zeros(k.shape[:3], dtype=torch.float32, device=k.device)
    run_start, run_stop = runs or (end, end)
    dim = q.shape[3]

    def add(grid, tiles, size, is_window, first_tile=0, tile_step=1):
        launch(
            _key_gradient, grid,
            q, k, v, do, lse, delta, dk, dv, lse if sums is None else sums,
            end if gate_scores is None else gate_scores, end if tau is None else tau,
            run_start, run_stop,
            end, geometry.sequences, tiles, lists.offsets, lists.counts, lists.keys,
            *strides(q), *strides(k), *strides(v), *strides(do),
            geometry.heads, geometry.group, geometry.queries, geometry.keys, window,
            scale * LOG2_E, cap_of(softcap), first_tile, tile_step,
            SIZE=size, BN=config.keys, BQ=config.rows, D=dim,
            DP=max(16, triton.next_power_of_2(dim)), GATE=GATES[gate], WINDOW=is_window,
            SCORES=runs is not None, ATOMIC=not deterministic, WIDE=needs_wide_index(k, v),
            PRECISION=dot_precision(q.dtype), MASKED_STAGES=config.masked_stages,
            CAPPED=softcap is not None,
            **config.options(),
        )  # fmt: skip

    tiles = geometry.tiles(config.keys)
    add((tiles.shape[0], geometry.heads), tiles, config.keys, True)
    parts = -(-lists.capacity // config.keys)
    count = lists.tiles.shape[0]
    if parts and deterministic:
        # Batch items share no key, so their super tiles of one place may run together.
        items = 1 if geometry.packed else geometry.batch
        step = count // items
        for place in range(step):
            grid = (parts, items, geometry.heads)
            add(grid, lists.tiles, lists.size, False, first_tile=place, tile_step=step)
    elif parts:
        add((parts, count, geometry.heads), lists.tiles, lists.size, False)
    return dk, dv, sums
