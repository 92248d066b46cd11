"""The gradient of the scores: interior runs, and du from two sums of the gate gradient."""

import torch

from sparsek_kernels.triton.geometry import Geometry, owners


def running_sum(x: torch.Tensor) -> torch.Tensor:
    """Exclusive running sum of a 1-D tensor, one element longer; the same bits in every run."""
    length = x.shape[0]
    if length <= 4096:
        return torch.nn.functional.pad(x.cumsum(0), (1, 0))
    blocks = torch.nn.functional.pad(x, (0, -length % 1024)).view(-1, 1024).cumsum(1)
    before = running_sum(blocks[:, -1].contiguous())[:-1]
    return torch.nn.functional.pad((blocks + before[:, None]).view(-1)[:length], (1, 0))


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
    e = scores.detach().reshape(-1, keys).contiguous()
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
    first, size = owners(geometry, tau.numel(), tau.device)
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
