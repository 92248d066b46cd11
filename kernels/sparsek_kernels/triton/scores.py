"""What the gates and the gradient of the scores need: tau of every prefix, interior runs, du.

tau_t solves sum over the candidates of clip(e - tau, 0, 1) = k. Written as a sum over signed
breakpoints, f_t(x) = sum of sign * (b - x) over breakpoints b > x with (b, sign) in {(e, +1),
(e - 1, -1)} (derived; method section 2, choice c). All queries descend together through a binary
tree over the sorted breakpoints; inside a tree node the breakpoints stand in order of arrival, so
"those that have arrived at query t" are a prefix of the node and its sums are differences of one
running sum. O(N log N) work, log N steps.
"""

from collections.abc import Sequence

import torch

from sparsek_kernels.triton.geometry import Geometry


def running_sum(x: torch.Tensor) -> torch.Tensor:
    """Exclusive running sum of a 1-D tensor, one element longer; the same bits in every run."""
    length = x.shape[0]
    if length <= 4096:
        return torch.nn.functional.pad(x.cumsum(0), (1, 0))
    blocks = torch.nn.functional.pad(x, (0, -length % 1024)).view(-1, 1024).cumsum(1)
    before = running_sum(blocks[:, -1].contiguous())[:-1]
    return torch.nn.functional.pad((blocks + before[:, None]).view(-1)[:length], (1, 0))


def _owners(geometry: Geometry, flat_keys: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """First flat key and number of keys of the (row, sequence) of every flat key, int64."""
    place = torch.arange(flat_keys, device=device)
    row = place.div(geometry.keys, rounding_mode="floor")
    if not geometry.packed:
        return row * geometry.keys, torch.full_like(place, geometry.keys)
    starts = geometry.sequences[:, 3].contiguous().long()
    document = torch.searchsorted(starts, place - row * geometry.keys, right=True) - 1
    return row * geometry.keys + starts[document], geometry.sequences[:, 4].long()[document]


def prefix_thresholds(
    scores: torch.Tensor,
    topk: Sequence[int],
    window: int,
    geometry: Geometry,
    outside: torch.Tensor | None,
) -> torch.Tensor:
    """tau float64 [B, G, N] of every query; -inf while there are at most k candidates (or k = 0).

    Args:
        scores: float64 [B, G, M] effective scores with M = N (no carried state).
        outside: bool, broadcastable to scores: keys that are no candidates (sinks).
    """
    batch, heads, keys = scores.shape
    device = scores.device
    e = scores.detach().reshape(batch * heads, keys)
    # Sums about an integer near the scores: float32 scores stay exact whatever their offset.
    centre = e.mean(1, keepdim=True).floor()
    k = torch.tensor(list(topk), device=device).repeat(batch)[:, None].expand_as(e).reshape(-1)
    candidate = torch.ones_like(e, dtype=torch.bool)
    if outside is not None:
        candidate = ~outside.expand_as(scores).reshape_as(e)
    first, size = _owners(geometry, e.numel(), device)
    tau = _descend((e - centre).reshape(-1), candidate.reshape(-1), k, first, size, geometry)
    tau = tau.view_as(e) + centre
    # tau over the candidates up to x is the tau of query x + window.
    shifted = torch.full_like(tau, -torch.inf)
    if keys > window:
        shifted[:, window:] = tau[:, : keys - window]
        local = (torch.arange(e.numel(), device=device) - first).view_as(e)
        shifted = shifted.masked_fill_(local < window, -torch.inf)
    return shifted.view(batch, heads, keys)


def _descend(e, candidate, k, first, size, geometry: Geometry) -> torch.Tensor:
    """tau after each key. All flat; `first` and `size` are those of the key's sequence."""
    keys = e.shape[0]
    device = e.device
    place = torch.arange(2 * keys, device=device)
    base = 2 * first  # first breakpoint of the sequence, by flat place
    room = 2 * size
    value = torch.stack((e, e - 1), 1).reshape(-1)
    sign = torch.stack((candidate, candidate), 1).double()
    sign[:, 1] *= -1
    sign = sign.reshape(-1)
    sorted_place = torch.sort(value, descending=True, stable=True).indices
    owner = base.repeat_interleave(2)
    if geometry.rows * geometry.count > 1:
        sorted_place = sorted_place[torch.sort(owner[sorted_place], stable=True).indices]
    ordered = value[sorted_place]  # by flat rank
    signed = sign[sorted_place]
    weighted = signed * ordered
    rank = torch.empty_like(sorted_place)
    rank[sorted_place] = place
    here = rank  # flat rank of the element that stands at each place, places in tree order

    sums = torch.zeros(keys, dtype=torch.float64, device=device)
    count = torch.zeros(keys, dtype=torch.float64, device=device)
    node = base  # first place of the node a query has reached
    arrived = 2 * (place[:keys] + 1) - base  # elements of that node that have arrived
    depth = max(1, (2 * geometry.longest - 1).bit_length())
    for level in reversed(range(depth)):
        half = 1 << level
        local = here - owner
        upper = (local & half) == 0
        ups = torch.nn.functional.pad(upper.cumsum(0), (1, 0))
        signs = running_sum(torch.where(upper, signed[here], 0.0))
        mass = running_sum(torch.where(upper, weighted[here], 0.0))
        stop = node + arrived
        up = ups[stop] - ups[node]
        more = count + (signs[stop] - signs[node])
        total = sums + (mass[stop] - mass[node])
        split = ordered[torch.minimum(node + half, base + room) - 1]
        reaches = total - split * more >= k
        sums = torch.where(reaches, sums, total)
        count = torch.where(reaches, count, more)
        arrived = torch.where(reaches, up, arrived - up)
        node = torch.where(reaches, node, torch.minimum(node + half, base + room - 1))
        if level:
            # A stable partition of every node by this bit, the upper half first.
            start = owner + (local & ~(2 * half - 1))
            before = ups[:-1] - ups[start]
            behind = start + half + (place - start - before)
            moved = torch.empty_like(here)
            moved[torch.where(upper, start + before, behind)] = here
            here = moved
    tau = (sums - k) / count.clamp(min=1)
    seen = running_sum(candidate.long())
    seen = seen[1:] - seen[first]
    return torch.where((seen > k) & (k > 0), tau, -torch.inf)


def interior_runs(
    scores: torch.Tensor,
    tau: torch.Tensor,
    window: int,
    geometry: Geometry,
    outside: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """int32 [B, G, M] twice: key j is interior (e > tau and e - 1 < tau) for queries [a, b).

    tau never decreases inside a sequence; documents of one row are told apart by searching tau
    with the document's own offset added (derived).
    """
    batch, heads, keys = scores.shape
    e = scores.detach().reshape(-1, keys)
    t = tau.reshape(-1, keys)
    if geometry.packed:
        low = _search_documents(t, e - 1, geometry, right=True)
        high = _search_documents(t, e, geometry, right=False)
    else:
        low = torch.searchsorted(t, e - 1, right=True)
        high = torch.searchsorted(t, e)
    join = torch.arange(keys, device=e.device) + window
    low = torch.maximum(low, join)
    high = torch.maximum(low, high)
    if outside is not None:
        low = low.view(scores.shape).masked_fill(outside, 0)
        high = high.view(scores.shape).masked_fill(outside, 0)
    return low.view(scores.shape).int(), high.view(scores.shape).int()


def _search_documents(tau, value, geometry: Geometry, *, right: bool) -> torch.Tensor:
    """searchsorted of each value in its own document's stretch of tau, by bisection."""
    first, size = _owners(geometry, tau.numel(), tau.device)
    flat, wanted = tau.reshape(-1), value.reshape(-1)
    low, high = first, first + size
    for _ in range(geometry.longest.bit_length() + 1):
        middle = (low + high) // 2
        probe = flat[middle.clamp(max=flat.numel() - 1)]
        below = ((probe <= wanted) if right else (probe < wanted)) & (low < high)
        low = torch.where(below, middle + 1, low)
        high = torch.where(below, high, middle)
    row = torch.arange(tau.shape[0], device=tau.device)[:, None] * tau.shape[1]
    return low.view_as(tau) - row


def score_gradient(
    column_sum: torch.Tensor,
    row_sum: torch.Tensor,
    runs: tuple[torch.Tensor, torch.Tensor],
    group: int,
) -> torch.Tensor:
    """de float64 [B, G, M]: du of method section 3 from the two sums of dm over interior pairs.

    Args:
        column_sum: [B, G, M], over the queries of a key (and the heads of the group).
        row_sum: [B, H, N], over the keys of a query.
        runs: interior runs [a, b) of the keys.
    """
    batch, heads, keys = column_sum.shape
    rows = row_sum.double().view(batch, heads, group, keys).sum(2).view(-1)
    start, stop = (run.reshape(batch * heads, keys).long() for run in runs)
    offset = torch.arange(batch * heads, device=rows.device)[:, None] * keys
    start, stop = start.clamp(max=keys), stop.clamp(max=keys)
    some = (stop > start).double()
    change = torch.zeros(batch * heads, keys + 1, dtype=torch.float64, device=rows.device)
    change.scatter_add_(1, start, some).scatter_add_(1, stop, -some)  # whole numbers: exact
    members = running_sum(change[:, :keys].reshape(-1).contiguous())[1:]
    # Runs that last to the end of a row leave the next row's count alone.
    leftover = running_sum(change[:, :keys].sum(1))[:-1]
    members = (members.view(-1, keys) - leftover[:, None]).clamp(min=1)
    mean = running_sum((rows.view(-1, keys) / members).reshape(-1))
    taken = mean[stop + offset] - mean[start + offset]
    return column_sum.double() - taken.view_as(column_sum)
