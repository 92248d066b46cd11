"""tau of every prefix: the threshold of the SparseK operator as candidates arrive."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsek_kernels.keys import KeyList
from sparsek_kernels.keys import candidates as candidates_of
from sparsek_kernels.pytorch.selection import CHUNK, CONTENDERS, compress
from sparsek_kernels.state import SlotLayout, SparseKState

# Between larger numbers float64 leaves a gate, which is between 0 and 1, too few steps.
_LARGEST_SCORE = 2.0**30
_STEPS = 200  # Newton needs a handful; bisection to the last bit needs about 60


class NoThreshold(ValueError):
    """Scores are so large that what they exceed a threshold by is lost in rounding."""


def prefix_thresholds(
    candidates: Tensor,
    topk: Tensor,
    *,
    support: Tensor | None = None,
    seen: Tensor | None = None,
    tau: Tensor | None = None,
) -> Tensor:
    """Exact tau_t over the candidates 0..t of each row, for every t (derived).

    tau never decreases, so a candidate at or below it is dropped for good. The rest of the past
    is a sorted list with running sums; a chunk's own candidates are compared directly; a
    bracketed Newton iteration finds the linear piece and the closed form gives tau on it.
    Sums are taken about floor(tau), where float32 scores are exact whatever their offset.

    Args:
        candidates: [R, N] float64; candidate i joins at query i; -inf marks none.
        topk: [R] int64; 0 means no selection (tau stays -inf).
        support: [R, W] float64, earlier candidates above tau; -inf marks none.
        seen: [R] int64, number of earlier candidates, dropped ones included.
        tau: [R] float64, tau before query 0.

    Returns:
        [R, N] float64, non-decreasing; -inf while there are at most k candidates.
    """
    rows, n = candidates.shape
    device = candidates.device
    if tau is None:
        tau = candidates.new_full((rows,), -torch.inf)
    if seen is None:
        seen = torch.zeros(rows, dtype=torch.int64, device=device)
    if support is None:
        support = candidates.new_empty(rows, 0)
    active = support.sort(dim=1).values
    out = candidates.new_empty(rows, n)
    selects = (topk > 0)[:, None]
    for begin in range(0, n, CHUNK):
        chunk = candidates[:, begin : begin + CHUNK]
        contends = (chunk > tau[:, None]) & selects
        width = int(contends.sum(1).max()) if rows else 0
        if width == 0:
            out[:, begin : begin + CHUNK] = tau[:, None]
        else:
            columns = compress(contends, width)
            absent = columns == chunk.shape[1]
            picked = columns.masked_fill(absent, 0)
            values = chunk.gather(1, picked).masked_fill_(absent, -torch.inf)
            counts = (chunk > -torch.inf).cumsum(1) + seen[:, None]
            enough = counts.gather(1, picked).masked_fill_(absent, 0) > topk[:, None]
            taus = [tau[:, None]]
            for a in range(0, width, CONTENDERS):
                part = slice(a, a + CONTENDERS)
                taus.append(_solve(active, values[:, part], enough[:, part], tau, topk))
                tau = taus[-1][:, -1]
                active = _merge(active, values[:, part], tau)
            steps = torch.cat(taus, 1)
            out[:, begin : begin + CHUNK] = steps.gather(1, contends.cumsum(1))
        seen = seen + (chunk > -torch.inf).sum(1)
    return out


def _merge(active: Tensor, new: Tensor, tau: Tensor) -> Tensor:
    """Sorted union of what is above tau; -inf pads on the left, as few as possible.

    Linear in `active` (a sort of both would cost its logarithm at every step).
    """
    new = new.sort(dim=1).values
    size = active.shape[1] + new.shape[1]
    at_old = torch.searchsorted(new, active) + torch.arange(active.shape[1], device=new.device)
    at_new = torch.searchsorted(active, new, right=True)
    at_new += torch.arange(new.shape[1], device=new.device)
    both = new.new_empty(new.shape[0], size).scatter_(1, at_old, active).scatter_(1, at_new, new)
    width = size - int((both <= tau[:, None]).sum(1).min())
    both = both[:, size - width :]
    return both.masked_fill(~(both > tau[:, None]), -torch.inf)


def _solve(active: Tensor, new: Tensor, enough: Tensor, tau: Tensor, topk: Tensor) -> Tensor:
    """tau after each of the new candidates; rows of `enough` False keep the old tau."""
    everything = torch.cat([active, new], 1)
    lowest = everything.masked_fill(everything == -torch.inf, torch.inf).amin(1)
    lowest = torch.where(torch.isfinite(lowest), lowest - 1, 0.0)
    start = torch.where(torch.isfinite(tau), tau, lowest)
    centre = start.floor()
    # Absent elements sit at -1, below every tau that is tried (all >= 0 after centring).
    old = (active - centre[:, None]).clamp(min=-1)
    old_low = old - 1
    # Summed from below: full elements, however large, stay out of the interior's sum.
    sums = torch.nn.functional.pad(old.clamp(min=0).cumsum(1), (1, 0))
    own = (new - centre[:, None]).clamp(min=-1)
    width = own.shape[1]
    arrived = torch.ones(width, width, dtype=torch.bool, device=own.device).tril()
    own_t = own[:, None, :].masked_fill(~arrived, -1)
    own_low = own_t - 1
    k = topk[:, None].to(torch.float64)

    low = (start - centre)[:, None].expand(-1, width).contiguous()
    high = torch.cat([old, own], 1).amax(1)[:, None].expand(-1, width).contiguous()
    floor = low
    x = low.clone()
    done = ~enough
    flat = torch.zeros_like(done)
    before_full = torch.full_like(x, -1)
    before_interior = torch.full_like(x, -1)
    for _ in range(_STEPS):
        above = torch.searchsorted(old, x, right=True)
        full = torch.searchsorted(old_low, x)
        inside = (own_t > x[:, :, None]) & (own_low < x[:, :, None])
        n_full = (old.shape[1] - full + (own_low >= x[:, :, None]).sum(2)).to(x.dtype)
        n_interior = (full - above + inside.sum(2)).to(x.dtype)
        total = sums.gather(1, full) - sums.gather(1, above)
        total = total + (own_t * inside).sum(2)
        mass = total - n_interior * x + n_full
        newton = (total + n_full - k) / n_interior.clamp(min=1)
        same = (n_full == before_full) & (n_interior == before_interior)
        close = (newton - x).abs() <= 4 * torch.finfo(x.dtype).eps * x.abs().clamp(min=1)
        settled = (n_interior > 0) & (same | close)
        # A sum of k over a support of k has every p = 1: a stretch of solutions. Decided by
        # counts, as rounding may put x just beyond the stretch.
        stretch = (n_full + n_interior == k) & (settled | (n_interior == 0))
        flat |= stretch & ~done
        x = torch.where(settled & ~stretch & ~done, newton, x)
        done |= stretch | settled
        if bool(done.all()):
            break
        rises = mass > k
        low = torch.where(rises, x, low)
        high = torch.where(rises, high, x)
        usable = (n_interior > 0) & (newton > low) & (newton < high)
        step = torch.where(usable, newton, (low + high) / 2)
        before_full = torch.where(usable, n_full, -1.0)
        before_interior = torch.where(usable, n_interior, -1.0)
        x = torch.where(done, x, step)
    # Of a stretch the left end, the largest element outside the support: thresholds of growing
    # prefixes then never decrease.
    outside = torch.nn.functional.pad(old, (1, 0), value=-1.0)
    outside = outside.gather(1, torch.searchsorted(old, x, right=True))
    own_outside = own_t.masked_fill(own_t > x[:, :, None], -1).amax(2)
    edge = torch.maximum(torch.maximum(outside, own_outside), floor)
    x = torch.where(flat, edge, x)
    result = torch.where(enough, x + centre[:, None], tau[:, None])
    return torch.maximum(result.cummax(1).values, tau[:, None])


def interior_runs(effective: Tensor, joins: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """Queries [a, b) for which each key is interior: e > tau and e - 1 < tau.

    Args:
        effective: [R, M] float64. joins: [R, M] or [M] int64, query at which a key becomes a
            candidate. tau: [R, N] float64, non-decreasing.

    Returns:
        a, b: [R, M] int64 with joins <= a <= b (clipped to N).
    """
    n = tau.shape[1]
    tau = tau.contiguous()
    a = torch.searchsorted(tau, (effective - 1).contiguous(), right=True)
    b = torch.searchsorted(tau, effective.contiguous())
    a = torch.maximum(a, joins.clamp(0, n).expand_as(a))
    return a, torch.maximum(a, b)


def interior_counts(effective: Tensor, joins: Tensor, tau: Tensor) -> Tensor:
    """|I_t| for every query, [R, N] int64, by the same predicate as everything else."""
    rows, n = tau.shape
    a, b = interior_runs(effective, joins, tau)
    change = torch.zeros(rows, n + 1, dtype=torch.int64, device=tau.device)
    one = torch.ones_like(a)
    change.scatter_add_(1, a, one).scatter_add_(1, b, -one)
    return change.cumsum(1)[:, :n]


def query_thresholds(
    keys: KeyList, layout: SlotLayout, state: SparseKState | None
) -> tuple[Tensor, Tensor]:
    """tau [B * G, N] float64 and |I_t| [B * G, N] int64 of every query's candidates.

    Raises:
        NoThreshold: a threshold lies among scores that are too large for one.
    """
    joins = candidates_of(keys, layout).flatten(0, 1)
    batch = keys.effective.shape[0]
    topk = torch.tensor(layout.topk, device=joins.device).repeat(batch)
    support = seen = tau = None
    if state is not None:
        # Up to k candidates are all held; more have a tau. Keys that score -inf are none.
        held = keys.effective.detach()[:, :, layout.sinks : layout.sinks + keys.slots]
        seen = (held > -torch.inf).sum(2).flatten()
        if state.support is not None:
            support, tau = state.support.flatten(0, 1), state.tau.flatten()
            seen = torch.where(tau > -torch.inf, topk + 1, seen)
    taus = prefix_thresholds(joins, topk, support=support, seen=seen, tau=tau)
    selects = taus[:, -1:] > -torch.inf
    if bool(((joins > _LARGEST_SCORE) & selects).any()):
        raise NoThreshold(
            f"scores above {_LARGEST_SCORE:.0e}, +inf among them, have no threshold: gates 'log' "
            "and 'kv' and the gradient of scores need one; 'straight_through' without it takes them"
        )
    at = torch.arange(keys.n, device=joins.device).expand_as(joins)
    if support is not None:
        joins = torch.cat([support, joins], 1)
        at = torch.cat([torch.zeros_like(support, dtype=torch.int64), at], 1)
    return taus, interior_counts(joins, at, taus)
