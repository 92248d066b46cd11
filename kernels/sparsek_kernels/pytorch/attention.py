"""Sparse attention by tiles of queries against gathered keys, with its own backward."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsek_kernels.pytorch.stand_ins import tiled
from sparsek_kernels.pytorch.thresholds import interior_runs
from sparsek_kernels.pytorch.tiling import Tiles, Tiling


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _inference(
    q, keys, values, effective, end, tau, base, window, gate, scale, stand_ins=None, missing=None
) -> Tensor:
    """Forward alone: gates `straight_through` and `log` are a plain masked attention per tile."""
    tiling = Tiling(q, keys, end, base, window)
    # A CPU computes in fp32; an accelerator's attention accumulates in it anyway.
    exact = q.device.type == "cpu" or stand_ins is not None
    dtype = compute_dtype(q.dtype) if exact else q.dtype
    tiles = tiling.to_tiles(q)
    flat_k, flat_v = keys.reshape(-1, tiling.dim), values.reshape(-1, tiling.dim)
    out = torch.empty_like(tiles)
    soft = gate == "log"
    theirs = tiled(stand_ins, missing, tiling, scale, dtype)
    for step in tiling.steps(effective if soft else None, tau if soft else None):
        mask = step.visible
        if soft:
            mask = step.gate(dtype).log_().masked_fill_(~mask, -torch.inf)
        k, v = (
            _take(flat, step, dtype)[:, None].expand(-1, tiling.rep, -1, -1)
            for flat in (flat_k, flat_v)
        )
        if theirs is not None:
            k, v, mask = theirs.beside(step.span, k, v, mask)
        out[step.span] = torch.nn.functional.scaled_dot_product_attention(
            tiles[step.span].to(dtype), k, v, attn_mask=mask, scale=scale
        )
    return tiling.from_tiles(out)


def _own_precision(function):
    """Run outside autocast, which would turn the fp32 products into bf16."""

    @functools.wraps(function)
    def call(ctx, tensor, *rest):
        with torch.autocast(tensor.device.type, enabled=False):
            return function(ctx, tensor, *rest)

    return call


class _Attend(torch.autograd.Function):
    @staticmethod
    @_own_precision
    def forward(
        ctx, q, keys, values, effective, sink_logits, stand_ins, end, tau, counts, missing,
        base, window, gate, scale, softcap,
    ):  # fmt: skip
        tiling = Tiling(q, keys, end, base, window)
        dtype = compute_dtype(q.dtype)
        tiles = tiling.to_tiles(q)
        flat_k, flat_v = keys.reshape(-1, tiling.dim), values.reshape(-1, tiling.dim)
        out = torch.empty_like(tiles)
        logsum = torch.empty(tiles.shape[:3], dtype=dtype, device=q.device)
        soft = gate != "straight_through"
        nothing = tiling.per_tile(sink_logits, dtype)
        theirs = tiled(stand_ins, missing, tiling, scale, dtype)
        for step in tiling.steps(effective if soft else None, tau if soft else None):
            logits, m = _capped(_logits(step, tiles, flat_k, scale, dtype), softcap), None
            if soft:
                m = step.gate(dtype)
                logits = logits + m.log() if gate == "log" else logits * m
            logits.masked_fill_(~step.visible, -torch.inf)
            # A query beyond the end of the sequence may see nothing at all.
            top = logits.amax(-1, keepdim=True).clamp_(min=torch.finfo(dtype).min)
            if nothing is not None:
                top = top.maximum(nothing[step.span])
            if theirs is not None:
                own, their_values = theirs.logits(step.span, tiles[step.span].to(dtype))
                top = top.maximum(own.amax(-1, keepdim=True))
            weights = logits.sub_(top).exp_()
            total = weights.sum(-1, keepdim=True)
            if nothing is not None:
                total += nothing[step.span].sub(top).exp_()
            if gate == "kv":
                weights *= m
            part = _rows(weights).bmm(_take(flat_v, step, dtype)).view_as(out[step.span])
            if theirs is not None:
                own = own.sub_(top).exp_()
                total += own.sum(-1, keepdim=True)
                part += own @ their_values
            out[step.span] = (part / total).to(q.dtype)
            logsum[step.span] = (top + total.log()).squeeze(-1)
        out = tiling.from_tiles(out)
        ctx.save_for_backward(
            q, keys, values, effective, sink_logits, stand_ins, end, tau, counts, missing, out,
            logsum,
        )  # fmt: skip
        ctx.settings = (base, window, gate, scale, softcap)
        return out

    @staticmethod
    @once_differentiable
    @_own_precision
    def backward(ctx, grad_out):
        q, keys, values, effective, sink_logits, stand_ins, *rest = ctx.saved_tensors
        end, tau, counts, missing, out, logsum = rest
        base, window, gate, scale, softcap = ctx.settings
        tiling = Tiling(q, keys, end, base, window)
        dtype = compute_dtype(q.dtype)
        wants_scores = ctx.needs_input_grad[3] and tau is not None
        tiles, grads = tiling.to_tiles(q), tiling.to_tiles(grad_out)
        delta = tiling.to_tiles((out.to(dtype) * grad_out.to(dtype)).sum(-1))
        flat_k, flat_v = keys.reshape(-1, tiling.dim), values.reshape(-1, tiling.dim)
        dq = torch.empty_like(tiles)
        dk = torch.zeros(flat_k.shape, dtype=dtype, device=q.device)
        dv = torch.zeros_like(dk)
        if wants_scores:
            de = torch.zeros(tiling.rows * tiling.m, dtype=torch.float64, device=q.device)
            dm_sum = torch.zeros(tiles.shape[0], tiling.block, dtype=torch.float64, device=q.device)
        theirs = tiled(stand_ins, missing, tiling, scale, dtype)
        soft = gate != "straight_through" or wants_scores
        for step in tiling.steps(effective if soft else None, tau if soft else None):
            log_total = logsum[step.span, ..., None]
            d = delta[step.span, ..., None]
            go = _rows(grads[step.span].to(dtype))
            v = _take(flat_v, step, dtype)
            raw = None
            if softcap is not None or gate != "straight_through":
                raw = _capped(_logits(step, tiles, flat_k, scale, dtype), softcap)
            if gate == "straight_through":
                if raw is None:
                    weights = _logits(step, tiles, flat_k, scale, dtype, minus=log_total)
                else:
                    weights = raw - log_total
                weights.exp_().masked_fill_(~step.visible, 0)
                ds = torch.baddbmm(_rows(-d), go, v.transpose(1, 2)).view_as(weights)
                dm = ds = ds.mul_(weights)
                carried = weights
            else:
                p = go.bmm(v.transpose(1, 2)).view_as(raw)
                m = step.gate(dtype)
                ds, carried, dm = _gated(step, gate, raw, m, p, d, log_total)
            if softcap is not None:
                ds = ds * (1 - (raw / softcap).square_())
            k = _take(flat_k, step, dtype)
            qs = _rows(tiles[step.span].to(dtype))
            ds3 = _rows(ds)
            dq_part = (ds3.bmm(k) * scale).view_as(dq[step.span])
            if theirs is not None:
                given = qs.view_as(dq_part), go.view_as(dq_part), log_total, d
                dq_part += theirs.backward(step.span, *given)
            dq[step.span] = dq_part.to(q.dtype)
            dk.index_add_(0, step.index, (ds3.transpose(1, 2).bmm(qs) * scale).flatten(0, 1))
            dv.index_add_(0, step.index, _rows(carried).transpose(1, 2).bmm(go).flatten(0, 1))
            if wants_scores:
                dm = dm.sum(1, keepdim=True).masked_fill_(~step.interior(), 0)
                de.index_add_(0, step.index, dm.sum(2, dtype=torch.float64).flatten())
                dm_sum[step.span] = dm.sum(3, dtype=torch.float64).squeeze(1)
        grad_e = None
        if wants_scores:
            grad_e = _score_gradient(tiling, de, dm_sum, effective, tau, counts)
        grad_sinks = None
        if sink_logits is not None:
            # Its weight carries no value: P = 0 in ds = weight (P - D).
            share = (tiling.per_tile(sink_logits, dtype) - logsum[..., None]).exp_().squeeze(-1)
            grad_sinks = tiling.from_tiles(share.mul_(delta)).sum((0, 2)).neg_()
            grad_sinks = grad_sinks.to(sink_logits.dtype)
        return (
            tiling.from_tiles(dq),
            dk.view(keys.shape).to(keys.dtype),
            dv.view(values.shape).to(values.dtype),
            grad_e,
            grad_sinks,
            None if theirs is None else theirs.gradient.view_as(stand_ins).to(stand_ins.dtype),
            *(None,) * 9,
        )


def _gated(step: Tiles, gate: str, raw, m, p, d, log_total) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of the raw logits, weights that carry the values, gradient of the gates.

    Method section 3, with a = softmax weight, P = do.v, D = row sum of (weight x gate x P).
    """
    if gate == "log":
        # e^(s - L), never (weight / m): a gate that rounds to zero hides its key.
        bare = (raw - log_total).exp_().masked_fill_(~(step.visible & (m > 0)), 0)
        weights = bare * m
        rest = p - d
        return weights * rest, weights, bare * rest
    a = (raw * m).sub_(log_total).exp_().masked_fill_(~step.visible, 0)
    rest = a * (m * p - d)
    return m * rest, a * m, a * p + raw * rest


def _rows(x: Tensor) -> Tensor:
    """[T, rep, Bq, W] -> [T, rep * Bq, W]."""
    return x.flatten(1, 2)


def _take(flat: Tensor, step: Tiles, dtype: torch.dtype) -> Tensor:
    tiles = step.visible.shape[0]
    return flat.index_select(0, step.index).to(dtype).view(tiles, -1, flat.shape[1])


def _logits(
    step: Tiles, tiles: Tensor, flat_k: Tensor, scale: float, dtype, minus: Tensor | None = None
) -> Tensor:
    """scale * q.k (- minus [T, rep, Bq, 1]), hidden keys included: [T, rep, Bq, W]."""
    k = _take(flat_k, step, dtype).transpose(1, 2)
    q = _rows(tiles[step.span].to(dtype) * scale)
    logits = q.bmm(k) if minus is None else torch.baddbmm(_rows(minus), q, k, beta=-1)
    return logits.view(*tiles[step.span].shape[:3], -1)


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    """softcap * tanh(x / softcap), in place."""
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def _score_gradient(tiling: Tiling, de, dm_sum, effective, tau, counts) -> Tensor:
    """du = selected interior dm, minus the mean over I_t at every query where j is interior.

    tau is monotone, so a key's interior queries are one run [a, b): a prefix sum of the means
    replaces the second sum (method section 3, derived).
    """
    n = tiling.n
    sums = dm_sum.view(tiling.rows, -1)[:, :n]
    mean = sums / counts.clamp(min=1)
    total = torch.cat([mean.new_zeros(tiling.rows, 1), mean.cumsum(1)], 1)
    joins = torch.arange(tiling.m, device=tau.device) - tiling.base
    a, b = interior_runs(effective.reshape(tiling.rows, tiling.m), joins, tau)
    de = de.view(tiling.rows, tiling.m) - (total.gather(1, b) - total.gather(1, a))
    return de.view(effective.shape)


def attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    effective: Tensor,
    end: Tensor,
    *,
    base: int,
    window: int,
    gate: str,
    scale: float,
    tau: Tensor | None = None,
    counts: Tensor | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    stand_ins: Tensor | None = None,
    missing: Tensor | None = None,
) -> Tensor:
    """Attention over an interval of queries per key.

    Differentiable in q, keys, values, effective, sink_logits and stand_ins.

    Query i sees key m iff m - base - window <= i < end[m]; from i >= m - base on it does so as a
    selected key (gate clip(e - tau_i, 0, 1)), before as one of its window (gate 1).

    Args:
        q: [B, H, N, D]. keys, values: [B, G, M, D], H a multiple of G.
        effective: [B, G, M] float64; +inf for sinks, whose gate is always 1.
        end: [B, G, M] int32.
        tau: [B * G, N] float64 and counts [B * G, N] int64 = |I_t|; needed by gates log and kv
            and for the gradient of `effective`, else None.
        softcap, sink_logits [H], stand_ins [H, W, 2 D + 2]: as in sparsek_attention.
        missing: [B, G, N], `log_missing` of every query; needed by stand_ins.

    Returns:
        [B, H, N, D] in q's dtype.
    """
    inputs = (q, keys, values, effective)
    settings = (base, window, gate, scale)
    plain = gate != "kv" and softcap is None and sink_logits is None
    wanted = inputs if stand_ins is None else (*inputs, stand_ins)
    if plain and not (torch.is_grad_enabled() and any(x.requires_grad for x in wanted)):
        if stand_ins is None:
            return _inference(*inputs, end, tau, *settings)
        with torch.autocast(q.device.type, enabled=False):
            return _inference(*inputs, end, tau, *settings, stand_ins, missing)
    given = sink_logits, stand_ins, end, tau, counts, missing
    return _Attend.apply(*inputs, *given, *settings, softcap)
