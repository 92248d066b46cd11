"""Attention over selected keys, window and sinks in one softmax.

One program owns a tile of rows, see `tiles.py`. It walks the tile's key list (gathered rows) and
the window (contiguous rows): first what every row of the tile sees, then the rest with masks.

Method section 3 has the gates; with s the scaled logit, log: s + log m, kv: m s and values m v.
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

_LOW = tl.constexpr(-1.0e30)
_LOG = tl.constexpr(LOG)
_KV = tl.constexpr(KV)


@triton.jit
def _softmax_step(
    raw, v, acc, top, total, scale, cap, gate, visible,
    GATE: tl.constexpr, CAPPED: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds one tile of keys, raw = q k^T; logits are kept in base 2 (`scale` carries log2 e)."""
    logits = raw * scale
    if CAPPED:
        logits = capped(logits, cap)
    if GATE == _LOG:
        logits += tl.log2(gate)
    elif GATE == _KV:
        logits *= gate
    if MASKED:
        logits = tl.where(visible, logits, -float("inf"))
    new_top = tl.maximum(top, tl.max(logits, 1))
    weights = tl.exp2(logits - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(weights, 1)
    if GATE == _KV:
        weights = weights * gate
    acc = acc * shrink[:, None]
    acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, new_top, total


@triton.jit
def _attend(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, gate_scores, tau,
    end, sequences, tiles, offsets, counts, listed,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_n,
    heads, group, queries, row_keys, window, scale, cap,
    SIZE: tl.constexpr, BQ: tl.constexpr, HG: tl.constexpr, BN: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, GATE: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, MASKED_STAGES: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """out and lse of a tile of rows."""
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
    top = tl.full([BQ * HG], _LOW, tl.float32)
    total = tl.zeros([BQ * HG], tl.float32)
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
        if GATE != 0:
            gate = gate_of(row_gate, key, centre, tau_row, start < walk.whole)
        index = index_of(key, WIDE)
        k = load_rows(k_base, index * k_n, d, True, D, DP, False)
        v = load_rows(v_base, index * v_n, d, True, D, DP, False)
        raw = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        acc, top, total = _softmax_step(
            raw, v, acc, top, total, scale, cap, gate, True, GATE, CAPPED, False, PRECISION
        )
    for start in tl.range(0, masked_count(walk, at.t1), BN, num_stages=MASKED_STAGES):
        key, is_selected, inside, visible = masked_key(
            start + lane, walk, at, end + first_key, window
        )
        gate = 1.0
        if GATE != 0:
            gate = gate_of(row_gate, key, centre, tau_row, is_selected[None, :])
        index = index_of(key, WIDE)
        k = load_rows(k_base, index * k_n, d, inside, D, DP, True)
        v = load_rows(v_base, index * v_n, d, inside, D, DP, True)
        raw = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        acc, top, total = _softmax_step(
            raw, v, acc, top, total, scale, cap, gate, visible, GATE, CAPPED, True, PRECISION
        )

    total = tl.where(at.inside, total, 1.0)
    acc = acc / total[:, None]
    out_at = out_ptr + at.batch * o_b + at.query * o_n + at.q_head * o_h
    tl.store(out_at[:, None] + d[None, :], acc.to(out_ptr.dtype.element_ty), mask=rows)
    tl.store(lse_ptr + at.stat, top + tl.log2(total), mask=at.inside)


def attend_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    end: torch.Tensor,
    lists: KeyLists,
    geometry: Geometry,
    *,
    window: int,
    scale: float,
    gate: str,
    config: Config,
    gate_scores: torch.Tensor | None = None,
    tau: torch.Tensor | None = None,
    softcap: float | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [B, H, N, D] and lse float32 [B, H, N] in base 2.

    Args:
        q [B, H, N, D], k and v [B, G, M, D], last dimension dense.
        gate_scores, tau: float64 [B, G, M] (+inf for sinks) and [B, G, N]; only for log and kv.
        out: where to write, its last dimension dense; None: memory of its own.
    """
    if out is None:
        out = empty_rows(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    grid, per_tile, per_group = query_grid(geometry, lists, config)
    dim = q.shape[3]
    launch(
        _attend, grid,
        q, k, v, out, lse,
        end if gate_scores is None else gate_scores, end if tau is None else tau,
        end, geometry.sequences, lists.tiles, lists.offsets, lists.counts, lists.keys,
        *strides(q), *strides(k), *strides(v), *strides(out),
        geometry.heads, geometry.group, geometry.queries, geometry.keys, window, scale * LOG2_E,
        cap_of(softcap),
        SIZE=lists.size, BQ=per_tile, HG=per_group, BN=config.keys,
        D=dim, DP=max(16, triton.next_power_of_2(dim)), GATE=GATES[gate],
        WIDE=needs_wide_index(k, v), PRECISION=dot_precision(q.dtype),
        MASKED_STAGES=config.masked_stages, CAPPED=softcap is not None,
        **config.options(),
    )  # fmt: skip
    return out, lse
