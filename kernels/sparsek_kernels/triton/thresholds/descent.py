"""tau of every prefix: all queries descend together through a tree over the sorted breakpoints.

tau_t solves sum over the candidates of clip(e - tau, 0, 1) = k. Written as a sum over signed
breakpoints, f_t(x) = sum of sign * (b - x) over breakpoints b > x with (b, sign) in {(e, +1),
(e - 1, -1)} (derived; method section 2, choice c). A node of the tree is a range of ranks; inside
it the breakpoints stand in order of arrival, so "those that have arrived at query t" are a prefix
of the node and their sums are differences of one running sum. Nodes are halved down to leaves
(`LEAVES`), which a query then walks from the top, to the two breakpoints that enclose tau: there
f_t is a straight line.

Two launches per level: running sums, and the descent with the stable partition that makes the next
level. All sums have a fixed order: the same bits in every run.

Where exactly k candidates are full and none is interior, f_t is k on a stretch, and rounding would
choose among its solutions, another one for every query. `NEAR` makes it the highest for all of
them: a breakpoint, to the bit, at which no key is interior.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from sparsek_kernels.triton.geometry import Geometry, descending_order, head_budgets
from sparsek_kernels.triton.launches.launch import launch
from sparsek_kernels.triton.running_sums import sum_between
from sparsek_kernels.triton.thresholds.breakpoints import (
    arrange,
    breakpoints,
    finite_scores,
    row_centres,
    segment,
)

BLOCK = 1024
# Ranks of a leaf by the length from which it is so large: a shorter walk is worth the launches of
# two more levels only where many queries walk.
LEAVES = ((16_384, 32), (0, 128))
# Places whose running sums are made together, likewise: a query walks over the blocks of its row.
SUMS = ((32_768, 4096), (0, 1024))
NEAR = tl.constexpr(1e-9)  # f_t is k where it is this close: above all rounding of its sums


@triton.jit
def _terms(here, ordered, sign, place, base, inside, half):
    """(count and sign in one word, signed value) of the elements that lie in an upper half."""
    rank = tl.load(here + place, mask=inside, other=0)
    upper = inside & (((rank - base) & half) == 0)
    mark = tl.load(sign + rank, mask=upper, other=0)
    value = tl.load(ordered + rank, mask=upper, other=0.0)
    word = tl.where(upper, (mark.to(tl.int64) << 32) + 1, 0)
    return word, mark.to(tl.float64) * value


@triton.jit(do_not_specialize=["half"])
def _running(
    here, ordered, sign, first_keys, lengths, word_sums, mass_sums, words, masses,
    size, row_keys, half, PACKED: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Sums of each block of places, see `running_sums`."""
    block = tl.program_id(0)
    place = block * SUMS + tl.arange(0, SUMS)
    inside = place < size
    first, _ = segment(place >> 1, inside, first_keys, lengths, row_keys, PACKED)
    word, mass = _terms(here, ordered, sign, place, 2 * first, inside, half)
    tl.store(word_sums + place, tl.cumsum(word, 0), mask=inside)
    tl.store(mass_sums + place, tl.cumsum(mass, 0), mask=inside)
    tl.store(words + block, tl.sum(word, 0))
    tl.store(masses + block, tl.sum(mass, 0))


@triton.jit(do_not_specialize=["half"])
def _descend(
    here, moved, when, ordered, first_keys, lengths, word_sums, mass_sums, words, masses,
    sums, counts, nodes, arrived, budgets, size, row_keys, heads, half, place_blocks,
    LEAF: tl.constexpr, PACKED: tl.constexpr, SUMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Moves every element to its half of its node, and every query to the half that holds tau."""
    block = tl.program_id(0)
    if block < place_blocks:
        place = block * BLOCK + tl.arange(0, BLOCK)
        inside = place < size
        first, _ = segment(place >> 1, inside, first_keys, lengths, row_keys, PACKED)
        rank = tl.load(here + place, mask=inside, other=0)
        base = 2 * first
        local = rank - base
        start = base + (local & ~(2 * half - 1))
        before = sum_between(word_sums, words, start, place, inside, SUMS)
        before = (before & 0xFFFFFFFF).to(tl.int32)
        behind = start + half + (place - start - before)
        target = tl.where((local & half) == 0, start + before, behind)
        tl.store(moved + target, rank, mask=inside)
        tl.store(when + rank, target, mask=inside & (half == LEAF))
    else:
        query = (block - place_blocks) * BLOCK + tl.arange(0, BLOCK)
        inside = query < size // 2
        first, length = segment(query, inside, first_keys, lengths, row_keys, PACKED)
        last = 2 * (first + length)
        node = tl.load(nodes + query, mask=inside, other=0)
        seen = tl.load(arrived + query, mask=inside, other=0)
        word = sum_between(word_sums, words, node, node + seen, inside, SUMS)
        mass = sum_between(mass_sums, masses, node, node + seen, inside, SUMS)
        ups = (word & 0xFFFFFFFF).to(tl.int32)
        total = tl.load(sums + query, mask=inside, other=0.0) + mass
        count = tl.load(counts + query, mask=inside, other=0) + ((word - ups) >> 32).to(tl.int32)
        split = tl.load(ordered + tl.minimum(node + half, last) - 1, mask=inside, other=0.0)
        k = tl.load(budgets + query // row_keys % heads, mask=inside, other=0)
        below = inside & (total - split * count.to(tl.float64) < k.to(tl.float64) - NEAR)
        tl.store(sums + query, total, mask=below)
        tl.store(counts + query, count, mask=below)
        tl.store(nodes + query, tl.minimum(node + half, last - 1), mask=below)
        tl.store(arrived + query, tl.where(below, seen - ups, ups), mask=inside)


@triton.jit
def _finish(
    scores, order, when, ordered, sign, first_keys, lengths, centres,
    sums, counts, nodes, arrived, budgets, tau, queries, row_keys, heads, window, sinks,
    LEAF: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Walks every query's leaf down to tau: that of key x belongs to query x + window."""
    query = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    lane = tl.arange(0, WIDTH)
    inside = query < queries
    first, length = segment(query, inside, first_keys, lengths, row_keys, PACKED)
    node = tl.load(nodes + query, mask=inside, other=0)
    seen = tl.load(arrived + query, mask=inside, other=0)
    total = tl.load(sums + query, mask=inside, other=0.0)
    count = tl.load(counts + query, mask=inside, other=0)
    k = tl.load(budgets + query // row_keys % heads, mask=inside, other=0)
    stop = tl.minimum(node + LEAF, 2 * (first + length))
    above = inside  # every breakpoint so far
    edge = node * 0 - 1  # rank of the breakpoint that tau is
    for start in range(0, LEAF, WIDTH):
        rank = node[:, None] + start + lane[None, :]
        exists = inside[:, None] & (rank < stop[:, None])
        turn = tl.load(when + rank, mask=exists, other=0) - node[:, None]
        is_here = exists & (turn < seen[:, None])
        mark = tl.load(sign + rank, mask=is_here, other=0)
        value = tl.load(ordered + rank, mask=exists, other=0.0)
        mass = mark.to(tl.float64) * value
        masses = total[:, None] + tl.cumsum(mass, 1)
        marks = count[:, None] + tl.cumsum(mark, 1)
        level = masses - value * marks.to(tl.float64)
        below = exists & (level < (k.to(tl.float64) - NEAR)[:, None])
        crossing = tl.min(tl.where(below, WIDTH, lane[None, :]), 1)
        is_edge = is_here & (level <= (k.to(tl.float64) + NEAR)[:, None])
        is_edge &= above[:, None] & (lane[None, :] == crossing[:, None])
        edge = tl.maximum(edge, tl.max(tl.where(is_edge, rank, -1), 1))
        taken = above[:, None] & (lane[None, :] < crossing[:, None])
        total += tl.sum(tl.where(taken, mass, 0.0), 1)
        count += tl.sum(tl.where(taken, mark, 0), 1)
        above &= crossing == WIDTH
    found = (total - k.to(tl.float64)) / tl.maximum(count, 1).to(tl.float64)
    found += tl.load(centres + 2 * (query // row_keys), mask=inside, other=0.0)
    place = tl.load(order + edge, mask=edge >= 0, other=0)
    at_edge, _ = finite_scores(scores, centres, place >> 1, edge >= 0, row_keys)
    found = tl.where(edge >= 0, at_edge - (place & 1).to(tl.float64), found)
    local = query - first
    candidates = tl.maximum(local + 1 - sinks, 0)
    found = tl.where((candidates > k) & (k > 0), found, -float("inf"))
    tl.store(tau + query + window, found, mask=inside & (local + window < length))
    tl.store(tau + query, -float("inf"), mask=inside & (local < window))


def _cut(device: torch.device, dtype: torch.dtype, *counts: int) -> Sequence[torch.Tensor]:
    """Tensors of at least so many elements in one piece of memory, each at a multiple of 64 B."""
    sizes = [triton.cdiv(count, 16) * 16 for count in counts]
    return torch.empty(sum(sizes), dtype=dtype, device=device).split(sizes)


def prefix_thresholds(
    scores: torch.Tensor,
    topk: Sequence[int],
    window: int,
    geometry: Geometry,
    sinks: int,
) -> torch.Tensor:
    """tau float64 [B, G, N] of every query; -inf while there are at most k candidates (or k = 0).

    Args:
        scores: float64 [B, G, M] effective scores with M = N (no carried state). Keys of -inf
            are no candidates: while only such keys bring a prefix above k, its tau is -inf or a
            number at which every gate is 1.
        sinks: so many first keys of every sequence are no candidates.
    Raises:
        ValueError: more than 2^30 keys times heads.
    """
    batch, heads, row_keys = scores.shape
    device = scores.device
    keys = scores.numel()
    size = 2 * keys
    if size >= 2**31 - 1:
        raise ValueError(f"{keys} keys times heads: at most 2^30 fit one call with score gradients")
    e = scores.contiguous()
    budgets = head_budgets(tuple(topk), device)
    packed = geometry.packed
    sum_block = next(places for length, places in SUMS if geometry.longest >= length)
    blocks, query_blocks = triton.cdiv(size, BLOCK), triton.cdiv(keys, BLOCK)
    sum_blocks = triton.cdiv(size, sum_block)
    tau = torch.empty(scores.shape, dtype=torch.float64, device=device)
    # Sums are written where the values were that have been read.
    values = mass_sums = torch.empty(size, dtype=torch.float64, device=device)
    ordered, sums, masses, centres = _cut(
        device, torch.float64, size, keys, sum_blocks, 2 * batch * heads
    )
    word_sums, words = _cut(device, torch.int64, size, sum_blocks)
    here, moved, sign, when, counts, nodes, arrived, first_keys, lengths = _cut(
        device, torch.int32, *(size,) * 4, *(keys,) * 3, *(keys * packed,) * 2
    )

    common = dict(PACKED=packed, num_warps=4)
    summed = dict(PACKED=packed, num_warps=max(4, sum_block // 256))  # 8 places to a thread
    launch(row_centres, (batch * heads,), e, centres, row_keys, BLOCK=4096, num_warps=8)
    launch(
        breakpoints, (query_blocks,),
        e, centres, values, geometry.sequences, first_keys, lengths, keys, row_keys,
        geometry.count, geometry.count.bit_length(), BLOCK=BLOCK, **common,
    )  # fmt: skip
    order = descending_order(values, geometry, per_key=2)
    launch(
        arrange, (blocks,),
        order, values, first_keys, lengths, here, ordered, sign, when,
        sums, counts, nodes, arrived, size, row_keys, sinks, BLOCK=BLOCK, **common,
    )  # fmt: skip
    leaf = next(ranks for length, ranks in LEAVES if geometry.longest >= length)
    half = 1 << max(0, (2 * geometry.longest - 1).bit_length() - 1)
    while half >= leaf:
        running = (word_sums, mass_sums, words, masses)
        launch(
            _running, (sum_blocks,),
            here, ordered, sign, first_keys, lengths, *running, size, row_keys, half,
            SUMS=sum_block, **summed,
        )  # fmt: skip
        launch(
            _descend, (blocks + query_blocks,),
            here, moved, when, ordered, first_keys, lengths, *running,
            sums, counts, nodes, arrived, budgets, size, row_keys, heads, half, blocks,
            LEAF=leaf, SUMS=sum_block, BLOCK=BLOCK, **common,
        )  # fmt: skip
        here, moved = moved, here
        half //= 2
    launch(
        _finish, (triton.cdiv(keys, 32),),
        e, order, when, ordered, sign, first_keys, lengths, centres,
        sums, counts, nodes, arrived, budgets, tau, keys, row_keys, heads, window, sinks,
        LEAF=leaf, BLOCK=32, WIDTH=32, **common,
    )  # fmt: skip
    return tau
