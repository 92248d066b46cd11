"""tau of every prefix: all queries descend together through a tree over the sorted breakpoints.

tau_t solves sum over the candidates of clip(e - tau, 0, 1) = k. Written as a sum over signed
breakpoints, f_t(x) = sum of sign * (b - x) over breakpoints b > x with (b, sign) in {(e, +1),
(e - 1, -1)} (derived; method section 2, choice c). A node of the tree is a range of ranks; inside
it the breakpoints stand in order of arrival, so "those that have arrived at query t" are a prefix
of the node and their sums are differences of one running sum. Halving the node log2(2 N) times
finds the two breakpoints that enclose tau, and there f_t is a straight line.

Three launches per level: block totals, running sums, descent with the stable partition that makes
the next level. All sums have a fixed order: the same bits in every run.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from sparsek_kernels.triton.geometry import Geometry, head_budgets

BLOCK = 1024


@triton.jit
def _terms(here, owner, ordered, sign, place, inside, half):
    """(count and sign in one word, signed value) of the elements that lie in an upper half."""
    rank = tl.load(here + place, mask=inside, other=0)
    base = tl.load(owner + place, mask=inside, other=0)
    upper = inside & (((rank - base) & half) == 0)
    mark = tl.load(sign + rank, mask=upper, other=0)
    value = tl.load(ordered + rank, mask=upper, other=0.0)
    word = tl.where(upper, (mark.to(tl.int64) << 32) + 1, 0)
    return word, mark.to(tl.float64) * value


@triton.jit(do_not_specialize=["half"])
def _totals(here, owner, ordered, sign, words, masses, size, half, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    place = block * BLOCK + tl.arange(0, BLOCK)
    word, mass = _terms(here, owner, ordered, sign, place, place < size, half)
    tl.store(words + block, tl.sum(word, 0))
    tl.store(masses + block, tl.sum(mass, 0))


@triton.jit(do_not_specialize=["half"])
def _running(
    here, owner, ordered, sign, words, masses, word_sums, mass_sums, size, half,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Exclusive running sums over all places; the sums of everything stand behind the last."""
    block = tl.program_id(0)
    word_before = tl.zeros([BLOCK], tl.int64)
    mass_before = tl.zeros([BLOCK], tl.float64)
    for start in range(0, block, BLOCK):
        at = start + tl.arange(0, BLOCK)
        word_before += tl.load(words + at, mask=at < block, other=0)
        mass_before += tl.load(masses + at, mask=at < block, other=0.0)
    word_first = tl.sum(word_before, 0)
    mass_first = tl.sum(mass_before, 0)
    place = block * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    word, mass = _terms(here, owner, ordered, sign, place, inside, half)
    tl.store(word_sums + place, word_first + tl.cumsum(word, 0) - word, mask=inside)
    tl.store(mass_sums + place, mass_first + tl.cumsum(mass, 0) - mass, mask=inside)
    if block == tl.num_programs(0) - 1:
        tl.store(word_sums + size, word_first + tl.sum(word, 0))
        tl.store(mass_sums + size, mass_first + tl.sum(mass, 0))


@triton.jit(do_not_specialize=["half"])
def _descend(
    here, moved, owner, ends, ordered, word_sums, mass_sums,
    sums, counts, nodes, arrived, budget, size, queries, half, place_blocks,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Moves every element to its half of its node, and every query to the half that holds tau."""
    block = tl.program_id(0)
    if block < place_blocks:
        place = block * BLOCK + tl.arange(0, BLOCK)
        inside = place < size
        rank = tl.load(here + place, mask=inside, other=0)
        base = tl.load(owner + place, mask=inside, other=0)
        local = rank - base
        start = base + (local & ~(2 * half - 1))
        before = tl.load(word_sums + place, mask=inside, other=0) & 0xFFFFFFFF
        before -= tl.load(word_sums + start, mask=inside, other=0) & 0xFFFFFFFF
        before = before.to(tl.int32)
        behind = start + half + (place - start - before)
        target = tl.where((local & half) == 0, start + before, behind)
        tl.store(moved + target, rank, mask=inside)
    else:
        query = (block - place_blocks) * BLOCK + tl.arange(0, BLOCK)
        inside = query < queries
        node = tl.load(nodes + query, mask=inside, other=0)
        seen = tl.load(arrived + query, mask=inside, other=0)
        last = tl.load(ends + query, mask=inside, other=1)
        word = tl.load(word_sums + node + seen, mask=inside, other=0)
        word -= tl.load(word_sums + node, mask=inside, other=0)
        mass = tl.load(mass_sums + node + seen, mask=inside, other=0.0)
        mass -= tl.load(mass_sums + node, mask=inside, other=0.0)
        ups = (word & 0xFFFFFFFF).to(tl.int32)
        total = tl.load(sums + query, mask=inside, other=0.0) + mass
        count = tl.load(counts + query, mask=inside, other=0) + ((word - ups) >> 32).to(tl.int32)
        split = tl.load(ordered + tl.minimum(node + half, last) - 1, mask=inside, other=0.0)
        k = tl.load(budget + query, mask=inside, other=0)
        below = inside & (total - split * count.to(tl.float64) < k.to(tl.float64))
        tl.store(sums + query, total, mask=below)
        tl.store(counts + query, count, mask=below)
        tl.store(nodes + query, tl.minimum(node + half, last - 1), mask=below)
        tl.store(arrived + query, tl.where(below, seen - ups, ups), mask=inside)


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
    k = head_budgets(tuple(topk), device)[None, :, None]
    k = k.expand(scores.shape).contiguous().view(-1)
    candidate = torch.ones_like(e, dtype=torch.int32)
    if outside is not None:
        candidate.view(scores.shape).masked_fill_(outside, 0)
    first, length = owners(geometry, e.numel(), device)
    tau = _solve((e - centre).reshape(-1), candidate.reshape(-1), k, first, length, geometry)
    tau = tau.view_as(e) + centre
    # tau over the candidates up to x is the tau of query x + window.
    shifted = torch.full_like(tau, -torch.inf)
    if keys > window:
        shifted[:, window:] = tau[:, : keys - window]
        local = (torch.arange(e.numel(), device=device) - first).view_as(e)
        shifted = shifted.masked_fill_(local < window, -torch.inf)
    return shifted.view(batch, heads, keys)


def owners(geometry: Geometry, flat_keys: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """First flat key and number of keys of the (row, sequence) of every flat key, int64."""
    place = torch.arange(flat_keys, device=device)
    row = place.div(geometry.keys, rounding_mode="floor")
    if not geometry.packed:
        return row * geometry.keys, torch.full_like(place, geometry.keys)
    starts = geometry.sequences[:, 3].contiguous().long()
    document = torch.searchsorted(starts, place - row * geometry.keys, right=True) - 1
    return row * geometry.keys + starts[document], geometry.sequences[:, 4].long()[document]


def _solve(e, candidate, k, first, length, geometry: Geometry) -> torch.Tensor:
    """tau after each key. All flat; `first` and `length` are those of the key's sequence."""
    keys = e.shape[0]
    size = 2 * keys
    if size >= 2**31 - 1:
        raise ValueError(f"{keys} keys times heads: at most 2^30 fit one call with score gradients")
    device = e.device
    value = torch.stack((e, e - 1), 1).reshape(-1)
    sign = torch.stack((candidate, -candidate), 1).reshape(-1)
    base = (2 * first).int()
    owner = base.repeat_interleave(2)
    order = torch.sort(value, descending=True, stable=True).indices
    segments = geometry.rows * geometry.count
    if segments > 1:
        number = owner[order]
        if segments <= 256 and not geometry.packed:
            number = (number // (2 * geometry.keys)).to(torch.uint8)
        order = order[torch.sort(number, stable=True).indices]
    ordered, sign = value[order], sign[order]
    here = torch.empty(size, dtype=torch.int32, device=device)
    place = torch.arange(size, dtype=torch.int32, device=device)
    here[order] = place
    moved = torch.empty_like(here)
    ends = (2 * (first + length)).int()
    blocks, query_blocks = triton.cdiv(size, BLOCK), triton.cdiv(keys, BLOCK)
    words = torch.empty(blocks, dtype=torch.int64, device=device)
    masses = torch.empty(blocks, dtype=torch.float64, device=device)
    word_sums = torch.empty(size + 1, dtype=torch.int64, device=device)
    mass_sums = torch.empty(size + 1, dtype=torch.float64, device=device)
    sums = torch.zeros(keys, dtype=torch.float64, device=device)
    counts = torch.zeros(keys, dtype=torch.int32, device=device)
    nodes = base.clone()
    arrived = 2 * (place[:keys] + 1) - base
    for level in reversed(range(max(1, (2 * geometry.longest - 1).bit_length()))):
        half = 1 << level
        common = (here, owner, ordered, sign, words, masses)
        _totals[(blocks,)](*common, size, half, BLOCK=BLOCK, num_warps=4)
        _running[(blocks,)](*common, word_sums, mass_sums, size, half, BLOCK=BLOCK, num_warps=4)
        _descend[(blocks + query_blocks,)](
            here, moved, owner, ends, ordered, word_sums, mass_sums,
            sums, counts, nodes, arrived, k, size, keys, half, blocks,
            BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
        here, moved = moved, here
    tau = (sums - k) / counts.clamp(min=1)
    seen = candidate.cumsum(0) if segments == 1 else _count_in_sequence(candidate, first)
    return torch.where((seen > k) & (k > 0), tau, -torch.inf)


def _count_in_sequence(candidate: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    running = torch.nn.functional.pad(candidate.cumsum(0), (1, 0))
    return running[1:] - running[first]
