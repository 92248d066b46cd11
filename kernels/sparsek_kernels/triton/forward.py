"""Attention over selected keys, window and sinks in one softmax, and the gradient of its queries.

One program owns a tile of rows: `BQ` neighbouring queries times `HG` heads of one group, which all
see nearly the same keys. It walks the tile's key list (gathered rows) and the window (contiguous
rows). Keys seen by every row of the tile need no mask; the rest is collected in one masked loop:
leftover and partly live selected keys, both ramps of the window.

Method section 3 has the gates; with s the scaled logit, log: s + log m, kv: m s and values m v.
"""

import torch
import triton
import triton.language as tl

from sparsek_kernels.triton.geometry import Geometry
from sparsek_kernels.triton.lists import KeyLists
from sparsek_kernels.triton.tuning import Config

LOG2_E = 1.4426950408889634
STRAIGHT_THROUGH, LOG, KV = 0, 1, 2
GATES = {"straight_through": STRAIGHT_THROUGH, "log": LOG, "kv": KV}

_LOW = tl.constexpr(-1.0e30)
_LOG = tl.constexpr(LOG)
_KV = tl.constexpr(KV)


@triton.jit
def gate_row(tau, where, inside):
    """tau of some queries as (centre, float32 distance from it): exact whatever the offset."""
    value = tl.load(tau + where, mask=inside, other=-float("inf"))
    known = value > -1.0e300
    centre = tl.max(tl.where(known, value, -1.0e300), 0)
    centre = tl.where(centre > -1.0e300, centre, 0.0)
    return centre, tl.where(known, value - centre, _LOW).to(tl.float32)


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
def _index(key, WIDE: tl.constexpr):
    return key.to(tl.int64) if WIDE else key


@triton.jit
def _clear_key(start, lane, whole, listed, first_near, t1):
    """Keys start.. of the run [front of the list, window from `first_near`]."""
    near = tl.minimum(first_near + start - whole + lane, t1 - 1)
    return tl.where(
        start < whole, tl.load(listed + start + lane, mask=start < whole, other=0), near
    )


@triton.jit
def _softmax_step(
    raw, v, acc, top, total, scale, gate, visible,
    GATE: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds one tile of keys, raw = q k^T; logits are kept in base 2 (`scale` carries log2 e)."""
    if GATE == _LOG:
        logits = raw * scale + tl.log2(gate)
    elif GATE == _KV:
        logits = raw * (scale * gate)
    else:
        logits = raw * scale
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
def _query_gradient_step(
    q, k, v, do, lse, delta, dq, row_sum, scale, gate, interior, visible,
    GATE: tl.constexpr, MASKED: tl.constexpr, SCORES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    raw = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
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
    dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq, row_sum


_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _attend(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    do_ptr, delta_ptr, dq_ptr, row_sum_ptr,
    gate_scores, tau, run_start, run_stop,
    end, sequences, tiles, offsets, counts, listed,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_n, do_b, do_h, do_n,
    heads, group, queries, row_keys, window, scale,
    SIZE: tl.constexpr, BQ: tl.constexpr, HG: tl.constexpr, BN: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, GATE: tl.constexpr, BACKWARD: tl.constexpr,
    SCORES: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    MASKED_STAGES: tl.constexpr,
):  # fmt: skip
    """Forward (BACKWARD False) writes out and lse; backward writes dq and the row sums of dm."""
    SUB: tl.constexpr = SIZE // BQ
    tile = tl.program_id(0) // SUB
    sequence = tl.load(tiles + 2 * tile)
    if sequence < 0:
        return
    place = tl.load(tiles + 2 * tile + 1)
    line = sequences + 6 * sequence
    batch = tl.load(line).to(tl.int64)
    first_query = tl.load(line + 1)
    query_count = tl.load(line + 2)
    first_key = tl.load(line + 3)
    key_count = tl.load(line + 4)
    window_first = tl.load(line + 5)
    local = place * SIZE + (tl.program_id(0) % SUB) * BQ
    if local >= query_count:
        return
    parts = group // HG
    head = tl.program_id(1) // parts
    part = tl.program_id(1) % parts

    # Key coordinates of the tile's queries.
    shift = first_key + key_count - query_count
    t0 = shift + local
    t1 = tl.minimum(t0 + BQ, first_key + key_count)
    lane = tl.arange(0, BQ * HG)
    t = t0 + lane // HG
    row_inside = t < t1
    query = (first_query + local + lane // HG).to(tl.int64)
    q_head = (head * group + part * HG + lane % HG).to(tl.int64)
    d = tl.arange(0, DP)
    d_inside = d < D
    row_mask = row_inside[:, None] & d_inside[None, :]

    row = batch * heads + head
    q_at = q_ptr + batch * q_b + query * q_n + q_head * q_h
    q = tl.load(q_at[:, None] + d[None, :], mask=row_mask, other=0.0)
    k_base = k_ptr + batch * k_b + head.to(tl.int64) * k_h
    v_base = v_ptr + batch * v_b + head.to(tl.int64) * v_h
    row_end = end + row * row_keys
    row_gate = gate_scores + row * row_keys
    stat = (batch * heads * group + q_head) * queries + query

    if BACKWARD:
        do_at = do_ptr + batch * do_b + query * do_n + q_head * do_h
        do = tl.load(do_at[:, None] + d[None, :], mask=row_mask, other=0.0)
        lse = tl.load(lse_ptr + stat, mask=row_inside, other=float("inf"))
        delta = tl.load(delta_ptr + stat, mask=row_inside, other=0.0)
        row_sum = tl.zeros([BQ * HG], tl.float32)
    else:
        top = tl.full([BQ * HG], _LOW, tl.float32)
        total = tl.zeros([BQ * HG], tl.float32)
    acc = tl.zeros([BQ * HG, DP], tl.float32)

    if GATE != 0:
        centre, tau_row = gate_row(tau, row * queries + query, row_inside)
    one = tile * heads + head
    base = tl.load(offsets + one)
    room = tl.load(offsets + one + 1) - base
    front = tl.load(counts + 2 * one)
    back = tl.load(counts + 2 * one + 1)
    whole = front // BN * BN
    lane_n = tl.arange(0, BN)

    # Keys that every query of the tile sees: from the front of the list, then from the window.
    low = tl.maximum(window_first, t0 - window + 1)
    ramp_end = tl.minimum(tl.maximum(t1 - window, low), t1)
    middle = tl.maximum(t0 + 1 - ramp_end, 0) // BN * BN
    # Keys are read one step ahead: their rows' addresses are then known when the loads are issued.
    next_key = _clear_key(0, lane_n, whole, listed + base, ramp_end, t1)
    for start in range(0, whole + middle, BN):
        key = next_key
        next_key = _clear_key(start + BN, lane_n, whole, listed + base, ramp_end, t1)
        gate = 1.0
        interior = True
        if GATE != 0:
            above = (tl.load(row_gate + key) - centre).to(tl.float32)
            gate = tl.minimum(tl.maximum(above[None, :] - tau_row[:, None], 0.0), 1.0)
            gate = tl.where(start < whole, gate, 1.0)
        if BACKWARD and SCORES:
            run_low = tl.load(run_start + row * row_keys + key)
            run_high = tl.load(run_stop + row * row_keys + key)
            run_high = tl.where(start < whole, run_high, 0)
            interior = (t[:, None] >= run_low[None, :]) & (t[:, None] < run_high[None, :])
        index = _index(key, WIDE)
        k = load_rows(k_base, index * k_n, d, True, D, DP, False)
        v = load_rows(v_base, index * v_n, d, True, D, DP, False)
        if BACKWARD:
            acc, row_sum = _query_gradient_step(
                q, k, v, do, lse, delta, acc, row_sum, scale, gate, interior, True,
                GATE, False, SCORES, PRECISION,
            )  # fmt: skip
        else:
            raw = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            acc, top, total = _softmax_step(
                raw, v, acc, top, total, scale, gate, True, GATE, False, PRECISION
            )

    # Everything that some query of the tile does not see.
    left = front - whole
    selected = left + back
    ramp = ramp_end - low
    second = ramp_end + middle
    masked = selected + ramp + t1 - second
    for start in tl.range(0, masked, BN, num_stages=MASKED_STAGES):
        item = start + lane_n
        is_selected = item < selected
        inside = item < masked
        where = tl.where(item < left, whole + item, room - back + item - left)
        key = tl.load(listed + base + where, mask=is_selected, other=0)
        near = tl.where(
            item < selected + ramp, low + item - selected, second + item - selected - ramp
        )
        key = tl.where(is_selected, key, near)
        key = tl.where(inside, key, 0)
        begin = tl.where(is_selected, key + window, key)
        stop = tl.where(
            is_selected, tl.load(row_end + key, mask=is_selected, other=0), key + window
        )
        stop = tl.where(inside, stop, 0)
        visible = (t[:, None] >= begin[None, :]) & (t[:, None] < stop[None, :])
        gate = 1.0
        interior = True
        if GATE != 0:
            above = (tl.load(row_gate + key) - centre).to(tl.float32)
            gate = tl.minimum(tl.maximum(above[None, :] - tau_row[:, None], 0.0), 1.0)
            gate = tl.where(is_selected[None, :], gate, 1.0)
        if BACKWARD and SCORES:
            run_low = tl.load(run_start + row * row_keys + key, mask=is_selected, other=0)
            run_high = tl.load(run_stop + row * row_keys + key, mask=is_selected, other=0)
            interior = visible & (t[:, None] >= run_low[None, :]) & (t[:, None] < run_high[None, :])
        index = _index(key, WIDE)
        k = load_rows(k_base, index * k_n, d, inside, D, DP, True)
        v = load_rows(v_base, index * v_n, d, inside, D, DP, True)
        if BACKWARD:
            acc, row_sum = _query_gradient_step(
                q, k, v, do, lse, delta, acc, row_sum, scale, gate, interior, visible,
                GATE, True, SCORES, PRECISION,
            )  # fmt: skip
        else:
            some = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            acc, top, total = _softmax_step(
                some, v, acc, top, total, scale, gate, visible, GATE, True, PRECISION
            )

    if BACKWARD:
        acc = acc * (scale * _LN_2)
        dq_at = dq_ptr + batch * o_b + query * o_n + q_head * o_h
        tl.store(dq_at[:, None] + d[None, :], acc.to(dq_ptr.dtype.element_ty), mask=row_mask)
        if SCORES:
            tl.store(row_sum_ptr + stat, row_sum, mask=row_inside)
    else:
        total = tl.where(row_inside, total, 1.0)
        acc = acc / total[:, None]
        out_at = out_ptr + batch * o_b + query * o_n + q_head * o_h
        tl.store(out_at[:, None] + d[None, :], acc.to(out_ptr.dtype.element_ty), mask=row_mask)
        tl.store(lse_ptr + stat, top + tl.log2(total), mask=row_inside)


def strides(tensor: torch.Tensor) -> tuple[int, int, int]:
    return tensor.stride(0), tensor.stride(1), tensor.stride(2)


def rows_of(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself if its last dimension is dense, else a copy."""
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def needs_wide_index(*tensors: torch.Tensor) -> bool:
    """Whether an offset inside one row of [B, G, M, D] can pass 2^31."""
    return any(t.shape[2] * t.stride(2) + t.shape[3] >= 2**31 for t in tensors)


def dot_precision(dtype: torch.dtype) -> str:
    return "ieee" if dtype == torch.float32 else "tf32"


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [B, H, N, D] and lse float32 [B, H, N] in base 2.

    Args:
        q [B, H, N, D], k and v [B, G, M, D], last dimension dense.
        gate_scores, tau: float64 [B, G, M] (+inf for sinks) and [B, G, N]; only for log and kv.
    """
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    _launch(
        q, k, v, out, lse, None, None, None, None, end, lists, geometry,
        window=window, scale=scale, gate=gate, config=config,
        gate_scores=gate_scores, tau=tau, runs=None,
    )  # fmt: skip
    return out, lse


def query_gradient(
    q, k, v, do, lse, delta, end, lists, geometry, *,
    window, scale, gate, config, gate_scores, tau, runs,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """dq [B, H, N, D] and, if `runs` is given, float32 [B, H, N]: dm summed over interior keys."""
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    row_sum = None if runs is None else torch.empty_like(lse)
    _launch(
        q, k, v, dq, lse, do, delta, dq, row_sum, end, lists, geometry,
        window=window, scale=scale, gate=gate, config=config,
        gate_scores=gate_scores, tau=tau, runs=runs,
    )  # fmt: skip
    return dq, row_sum


def _launch(
    q, k, v, out, lse, do, delta, dq, row_sum, end, lists, geometry, *,
    window, scale, gate, config, gate_scores, tau, runs,
) -> None:  # fmt: skip
    backward = do is not None
    group = geometry.group
    packed_heads = min(config.heads, group & -group)  # a power of two that divides the group
    bq = min(config.rows // packed_heads, lists.size)
    grid = (lists.tiles.shape[0] * (lists.size // bq), geometry.heads * (group // packed_heads))
    dim = q.shape[3]
    run_start, run_stop = runs or (end, end)
    do = q if do is None else do
    _attend[grid](
        q, k, v, out, lse,
        do, lse if delta is None else delta, out if dq is None else dq,
        lse if row_sum is None else row_sum,
        end if gate_scores is None else gate_scores, end if tau is None else tau,
        run_start, run_stop,
        end, geometry.sequences, lists.tiles, lists.offsets, lists.counts, lists.keys,
        *strides(q), *strides(k), *strides(v), *strides(out), *strides(do),
        geometry.heads, group, geometry.queries, geometry.keys, window, scale * LOG2_E,
        SIZE=lists.size, BQ=bq, HG=packed_heads, BN=config.keys,
        D=dim, DP=max(16, triton.next_power_of_2(dim)), GATE=GATES[gate], BACKWARD=backward,
        SCORES=runs is not None, WIDE=needs_wide_index(k, v), PRECISION=dot_precision(q.dtype),
        MASKED_STAGES=config.masked_stages,
        **config.options(),
    )  # fmt: skip
