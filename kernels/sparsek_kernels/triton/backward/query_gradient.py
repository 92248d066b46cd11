"""Gradient of queries: a tile of rows walks the keys that the forward pass walked.

And the gate gradient dm (method section 3), summed over the keys of a query; `key_gradient.py`
sums it over the queries of a key, `scores.py` joins both.
"""

import torch
import triton
import triton.language as tl

from sparsek_kernels.triton.geometry import Geometry
from sparsek_kernels.triton.launches.launch import launch
from sparsek_kernels.triton.lists import KeyLists
from sparsek_kernels.triton.tiles import (
    GATES,
    KV,
    LOG,
    LOG2_E,
    cap_of,
    capped,
    clear_key,
    dot_precision,
    empty_rows,
    gate_of,
    gate_row,
    index_of,
    load_rows,
    masked_count,
    masked_key,
    needs_wide_index,
    query_grid,
    sequence_at,
    strides,
    tile_of,
    walk_of,
)
from sparsek_kernels.triton.tuning import Config

_LOG = tl.constexpr(LOG)
_KV = tl.constexpr(KV)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _step(
    q, k, v, do, lse, delta, dq, row_sum, scale, cap, gate, interior, visible,
    GATE: tl.constexpr, CAPPED: tl.constexpr, MASKED: tl.constexpr, SCORES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    raw = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if CAPPED:
        raw = capped(raw, cap)
    weighted = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    logits = raw
    if GATE == _LOG:
        logits = raw + tl.log2(gate)
    elif GATE == _KV:
        logits = raw * gate
    if MASKED:
        logits = tl.where(visible, logits, -float("inf"))
    weights = tl.exp2(logits - lse[:, None])
    if GATE == _KV:
        ds = weights * (weighted * gate - delta[:, None])
        dm = weights * weighted + raw * _LN_2 * ds
        ds = ds * gate
    else:
        ds = weights * (weighted - delta[:, None])
        dm = ds
        if SCORES and GATE == _LOG:
            bare = tl.where(gate > 0, tl.exp2(raw - lse[:, None]), 0.0)
            dm = bare * (weighted - delta[:, None])
    if SCORES:
        row_sum += tl.sum(tl.where(interior, dm, 0.0), 1)
    if CAPPED:
        ds *= 1.0 - (raw / cap) * (raw / cap)
    dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq, row_sum


@triton.jit
def _query_gradient(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, row_sum_ptr,
    gate_scores, tau, run_start, run_stop,
    end, sequences, tiles, offsets, counts, listed,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_n, do_b, do_h, do_n,
    heads, group, queries, row_keys, window, scale, cap,
    SIZE: tl.constexpr, BQ: tl.constexpr, HG: tl.constexpr, BN: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, GATE: tl.constexpr, SCORES: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, MASKED_STAGES: tl.constexpr,
    CAPPED: tl.constexpr,
):  # fmt: skip
    """dq and, with SCORES, the row sums of dm over interior keys, of a tile of rows."""
    tile = tl.program_id(0) // (SIZE // BQ)
    number = tl.load(tiles + 2 * tile)
    if number < 0:
        return
    its = sequence_at(sequences, number)
    local = tl.load(tiles + 2 * tile + 1) * SIZE + (tl.program_id(0) % (SIZE // BQ)) * BQ
    if local >= its.queries:
        return
    at = tile_of(its, local, heads, group, queries, BQ, HG)
    walk = walk_of(
        tile * heads + at.head, at, its.window_first, window, offsets, counts, listed, BN
    )
    d = tl.arange(0, DP)
    rows = at.inside[:, None] & (d < D)[None, :]
    q_at = q_ptr + at.batch * q_b + at.query * q_n + at.q_head * q_h
    q = tl.load(q_at[:, None] + d[None, :], mask=rows, other=0.0)
    k_base = k_ptr + at.batch * k_b + at.head.to(tl.int64) * k_h
    v_base = v_ptr + at.batch * v_b + at.head.to(tl.int64) * v_h
    first_key = at.row * row_keys
    row_gate = gate_scores + first_key
    do_at = do_ptr + at.batch * do_b + at.query * do_n + at.q_head * do_h
    do = tl.load(do_at[:, None] + d[None, :], mask=rows, other=0.0)
    lse = tl.load(lse_ptr + at.stat, mask=at.inside, other=float("inf"))
    delta = tl.load(delta_ptr + at.stat, mask=at.inside, other=0.0)
    row_sum = tl.zeros([BQ * HG], tl.float32)
    acc = tl.zeros([BQ * HG, DP], tl.float32)
    if GATE != 0:
        centre, tau_row = gate_row(tau, at.row * queries + at.query, at.inside)
    lane = tl.arange(0, BN)

    # Keys are read one step ahead: their rows' addresses are then known when the loads are issued.
    next_key = clear_key(0, lane, walk, at.t1)
    for start in range(0, walk.whole + walk.middle, BN):
        key = next_key
        next_key = clear_key(start + BN, lane, walk, at.t1)
        gate = 1.0
        interior = True
        if GATE != 0:
            gate = gate_of(row_gate, key, centre, tau_row, start < walk.whole)
        if SCORES:
            run_low = tl.load(run_start + first_key + key)
            run_high = tl.load(run_stop + first_key + key)
            run_high = tl.where(start < walk.whole, run_high, 0)
            interior = (at.t[:, None] >= run_low[None, :]) & (at.t[:, None] < run_high[None, :])
        index = index_of(key, WIDE)
        k = load_rows(k_base, index * k_n, d, True, D, DP, False)
        v = load_rows(v_base, index * v_n, d, True, D, DP, False)
        acc, row_sum = _step(
            q, k, v, do, lse, delta, acc, row_sum, scale, cap, gate, interior, True,
            GATE, CAPPED, False, SCORES, PRECISION,
        )  # fmt: skip
    for start in tl.range(0, masked_count(walk, at.t1), BN, num_stages=MASKED_STAGES):
        key, is_selected, inside, visible = masked_key(
            start + lane, walk, at, end + first_key, window
        )
        gate = 1.0
        interior = True
        if GATE != 0:
            gate = gate_of(row_gate, key, centre, tau_row, is_selected[None, :])
        if SCORES:
            run_low = tl.load(run_start + first_key + key, mask=is_selected, other=0)
            run_high = tl.load(run_stop + first_key + key, mask=is_selected, other=0)
            interior = (at.t[:, None] >= run_low[None, :]) & (at.t[:, None] < run_high[None, :])
            interior = visible & interior
        index = index_of(key, WIDE)
        k = load_rows(k_base, index * k_n, d, inside, D, DP, True)
        v = load_rows(v_base, index * v_n, d, inside, D, DP, True)
        acc, row_sum = _step(
            q, k, v, do, lse, delta, acc, row_sum, scale, cap, gate, interior, visible,
            GATE, CAPPED, True, SCORES, PRECISION,
        )  # fmt: skip

    acc = acc * (scale * _LN_2)
    dq_at = dq_ptr + at.batch * o_b + at.query * o_n + at.q_head * o_h
    tl.store(dq_at[:, None] + d[None, :], acc.to(dq_ptr.dtype.element_ty), mask=rows)
    if SCORES:
        tl.store(row_sum_ptr + at.stat, row_sum, mask=at.inside)


def query_gradient(
    q, k, v, do, lse, delta, end, lists: KeyLists, geometry: Geometry, *,
    window: int, scale: float, gate: str, config: Config, gate_scores, tau, runs,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """dq [B, H, N, D] and, if `runs` is given, float32 [B, H, N]: dm summed over interior keys.

    Args:
        runs: int32 [B, G, M] twice, the queries [start, stop) at which a key is interior.
    """
    dq = empty_rows(q)
    row_sum = None if runs is None else torch.empty_like(lse)
    grid, per_tile, per_group = query_grid(geometry, lists, config)
    run_start, run_stop = runs or (end, end)
    dim = q.shape[3]
    launch(
        _query_gradient, grid,
        q, k, v, do, lse, delta, dq, lse if row_sum is None else row_sum,
        end if gate_scores is None else gate_scores, end if tau is None else tau,
        run_start, run_stop,
        end, geometry.sequences, lists.tiles, lists.offsets, lists.counts, lists.keys,
        *strides(q), *strides(k), *strides(v), *strides(dq), *strides(do),
        geometry.heads, geometry.group, geometry.queries, geometry.keys, window, scale * LOG2_E,
        cap_of(softcap),
        SIZE=lists.size, BQ=per_tile, HG=per_group, BN=config.keys,
        D=dim, DP=max(16, triton.next_power_of_2(dim)), GATE=GATES[gate],
        SCORES=runs is not None, WIDE=needs_wide_index(k, v), PRECISION=dot_precision(q.dtype),
        MASKED_STAGES=config.masked_stages, CAPPED=softcap is not None,
        **config.options(),
    )  # fmt: skip
    return dq, row_sum
