"""tau of every prefix: all queries descend together through a tree over the sorted breakpoints.

tau_t solves sum over the candidates of clip(e - tau, 0, 1) = k. Written as a sum over signed
breakpoints, f_t(x) = sum of sign * (b - x) over breakpoints b > x with (b, sign) in {(e, +1),
(e - 1, -1)} (derived; method section 2, choice c). A node of the tree is a range of ranks; inside
it the breakpoints stand in order of arrival, so "those that have arrived at query t" are a prefix
of the node and their sums are differences of one running sum. Nodes are halved down to leaves
(`LEAVES`), which a query then walks from the top, to the two breakpoints that enclose tau: there
f_t is a straight line.

Three launches per level: block totals, running sums, descent with the stable partition that makes
the next level. All sums have a fixed order: the same bits in every run.

Where exactly k candidates are full and none is interior, f_t is k on a stretch, and rounding would
choose among its solutions, another one for every query. `NEAR` makes it the highest for all of
them: a breakpoint, to the bit, at which no key is interior.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from sparsek_kernels.triton.geometry import Geometry, descending_order, head_budgets, owners

BLOCK = 1024
# Ranks of a leaf by the length from which it is so large: a shorter walk is worth the launches of
# two more levels only where many queries walk.
LEAVES = ((16_384, 32), (0, 128))
NEAR = tl.constexpr(1e-9)  # f_t is k where it is this close: above all rounding of its sums


@triton.jit
def _segment(key, inside, first_keys, lengths, row_keys, PACKED: tl.constexpr):
    """First flat key and number of keys of the segment of each flat key."""
    if PACKED:
        first = tl.load(first_keys + key, mask=inside, other=0)
        length = tl.load(lengths + key, mask=inside, other=1)
    else:
        first = key // row_keys * row_keys
        length = first * 0 + row_keys
    return first, length


@triton.jit
def _breakpoints(scores, centre, values, keys, row_keys, BLOCK: tl.constexpr):
    key = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = key < keys
    e = tl.load(scores + key, mask=inside, other=0.0)
    e -= tl.load(centre + key // row_keys, mask=inside, other=0.0)
    tl.store(values + 2 * key, e, mask=inside)
    tl.store(values + 2 * key + 1, e - 1, mask=inside)


@triton.jit
def _arrange(
    order, values, outside, first_keys, lengths, here, ordered, sign, when,
    sums, counts, nodes, arrived, size, row_keys,
    PACKED: tl.constexpr, OUTSIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The root: breakpoints by rank, their ranks in order of arrival; and every query's start."""
    rank = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rank < size
    place = tl.load(order + rank, mask=inside, other=0).to(tl.int32)
    mark = 1 - 2 * (place & 1)
    if OUTSIDE:
        skipped = tl.load(outside + (place >> 1) % row_keys, mask=inside, other=0)
        mark = tl.where(skipped != 0, 0, mark)
    tl.store(ordered + rank, tl.load(values + place, mask=inside, other=0.0), mask=inside)
    tl.store(sign + rank, mark, mask=inside)
    tl.store(when + rank, place, mask=inside)
    tl.store(here + place, rank, mask=inside)
    query = rank
    inside = query < size // 2
    first, _ = _segment(query, inside, first_keys, lengths, row_keys, PACKED)
    tl.store(sums + query, 0.0, mask=inside)
    tl.store(counts + query, 0, mask=inside)
    tl.store(nodes + query, 2 * first, mask=inside)
    tl.store(arrived + query, 2 * (query + 1 - first), mask=inside)


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
def _totals(
    here, ordered, sign, first_keys, lengths, words, masses, size, row_keys, half,
    PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    place = block * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    first, _ = _segment(place >> 1, inside, first_keys, lengths, row_keys, PACKED)
    word, mass = _terms(here, ordered, sign, place, 2 * first, inside, half)
    tl.store(words + block, tl.sum(word, 0))
    tl.store(masses + block, tl.sum(mass, 0))


@triton.jit(do_not_specialize=["half"])
def _running(
    here, ordered, sign, first_keys, lengths, words, masses, word_sums, mass_sums,
    size, row_keys, half, PACKED: tl.constexpr, BLOCK: tl.constexpr,
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
    first, _ = _segment(place >> 1, inside, first_keys, lengths, row_keys, PACKED)
    word, mass = _terms(here, ordered, sign, place, 2 * first, inside, half)
    tl.store(word_sums + place, word_first + tl.cumsum(word, 0) - word, mask=inside)
    tl.store(mass_sums + place, mass_first + tl.cumsum(mass, 0) - mass, mask=inside)
    if block == tl.num_programs(0) - 1:
        tl.store(word_sums + size, word_first + tl.sum(word, 0))
        tl.store(mass_sums + size, mass_first + tl.sum(mass, 0))


@triton.jit(do_not_specialize=["half"])
def _descend(
    here, moved, when, ordered, first_keys, lengths, word_sums, mass_sums,
    sums, counts, nodes, arrived, budgets, size, row_keys, heads, half, place_blocks,
    LEAF: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Moves every element to its half of its node, and every query to the half that holds tau."""
    block = tl.program_id(0)
    if block < place_blocks:
        place = block * BLOCK + tl.arange(0, BLOCK)
        inside = place < size
        first, _ = _segment(place >> 1, inside, first_keys, lengths, row_keys, PACKED)
        rank = tl.load(here + place, mask=inside, other=0)
        base = 2 * first
        local = rank - base
        start = base + (local & ~(2 * half - 1))
        before = tl.load(word_sums + place, mask=inside, other=0) & 0xFFFFFFFF
        before -= tl.load(word_sums + start, mask=inside, other=0) & 0xFFFFFFFF
        before = before.to(tl.int32)
        behind = start + half + (place - start - before)
        target = tl.where((local & half) == 0, start + before, behind)
        tl.store(moved + target, rank, mask=inside)
        tl.store(when + rank, target, mask=inside & (half == LEAF))
    else:
        query = (block - place_blocks) * BLOCK + tl.arange(0, BLOCK)
        inside = query < size // 2
        first, length = _segment(query, inside, first_keys, lengths, row_keys, PACKED)
        last = 2 * (first + length)
        node = tl.load(nodes + query, mask=inside, other=0)
        seen = tl.load(arrived + query, mask=inside, other=0)
        word = tl.load(word_sums + node + seen, mask=inside, other=0)
        word -= tl.load(word_sums + node, mask=inside, other=0)
        mass = tl.load(mass_sums + node + seen, mask=inside, other=0.0)
        mass -= tl.load(mass_sums + node, mask=inside, other=0.0)
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
    scores, order, when, ordered, sign, first_keys, lengths, centre, skipped,
    sums, counts, nodes, arrived, budgets, tau, queries, row_keys, heads, window,
    LEAF: tl.constexpr, PACKED: tl.constexpr, OUTSIDE: tl.constexpr,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Walks every query's leaf down to tau: that of key x belongs to query x + window."""
    query = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    lane = tl.arange(0, WIDTH)
    inside = query < queries
    first, length = _segment(query, inside, first_keys, lengths, row_keys, PACKED)
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
    found += tl.load(centre + query // row_keys, mask=inside, other=0.0)
    place = tl.load(order + edge, mask=edge >= 0, other=0)
    at_edge = tl.load(scores + (place >> 1), mask=edge >= 0, other=0.0)
    found = tl.where(edge >= 0, at_edge - (place & 1).to(tl.float64), found)
    local = query - first
    candidates = local + 1
    if OUTSIDE:
        candidates -= tl.load(skipped + query % row_keys + 1, mask=inside, other=0)
        candidates += tl.load(skipped + first % row_keys, mask=inside, other=0)
    found = tl.where((candidates > k) & (k > 0), found, -float("inf"))
    tl.store(tau + query + window, found, mask=inside & (local + window < length))
    tl.store(tau + query, -float("inf"), mask=inside & (local < window))


def _finite(e: torch.Tensor) -> torch.Tensor:
    """-inf becomes 2 below the row's lowest score: no gate of another key is then below 1."""
    absent = e == -torch.inf
    lowest = e.masked_fill(absent, torch.inf).amin(1, keepdim=True) - 2
    return torch.where(absent, lowest.nan_to_num(posinf=0.0), e)


def prefix_thresholds(
    scores: torch.Tensor,
    topk: Sequence[int],
    window: int,
    geometry: Geometry,
    outside: torch.Tensor | None,
) -> torch.Tensor:
    """tau float64 [B, G, N] of every query; -inf while there are at most k candidates (or k = 0).

    Args:
        scores: float64 [B, G, M] effective scores with M = N (no carried state). Keys of -inf
            are no candidates: while only such keys bring a prefix above k, its tau is -inf or a
            number at which every gate is 1.
        outside: bool [1, 1, M]: keys that are no candidates (sinks).
    Raises:
        ValueError: more than 2^30 keys times heads.
    """
    batch, heads, row_keys = scores.shape
    device = scores.device
    keys = scores.numel()
    size = 2 * keys
    if size >= 2**31 - 1:
        raise ValueError(f"{keys} keys times heads: at most 2^30 fit one call with score gradients")
    e = _finite(scores.detach().contiguous().view(batch * heads, row_keys))
    # Sums about an integer near the scores: float32 scores stay exact whatever their offset.
    centre = e.mean(1).floor()
    first_keys = lengths = e  # not read
    if geometry.packed:
        first_keys, lengths = (x.int() for x in owners(geometry, keys, device))
    skipped = is_outside = e
    if outside is not None:
        is_outside = outside.reshape(row_keys).to(torch.uint8)
        skipped = torch.nn.functional.pad(is_outside.cumsum(0, dtype=torch.int32), (1, 0))
    budgets = head_budgets(tuple(topk), device)

    def new(count: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(count, dtype=dtype, device=device)

    int32, float64 = torch.int32, torch.float64
    values, ordered = new(size, float64), new(size, float64)
    here, moved, sign, when = (new(size, int32) for _ in range(4))
    sums, counts, nodes, arrived = new(keys, float64), *(new(keys, int32) for _ in range(3))
    blocks, query_blocks = triton.cdiv(size, BLOCK), triton.cdiv(keys, BLOCK)
    words, masses = new(blocks, torch.int64), new(blocks, float64)
    word_sums, mass_sums = new(size + 1, torch.int64), new(size + 1, float64)
    tau = torch.empty_like(e)

    common = dict(PACKED=geometry.packed, BLOCK=BLOCK, num_warps=4)
    _breakpoints[(query_blocks,)](e, centre, values, keys, row_keys, BLOCK=BLOCK, num_warps=4)
    order = descending_order(values, geometry, per_key=2)
    _arrange[(blocks,)](
        order, values, is_outside, first_keys, lengths, here, ordered, sign, when,
        sums, counts, nodes, arrived, size, row_keys, OUTSIDE=outside is not None, **common,
    )  # fmt: skip
    leaf = next(ranks for length, ranks in LEAVES if geometry.longest >= length)
    half = 1 << max(0, (2 * geometry.longest - 1).bit_length() - 1)
    while half >= leaf:
        elements = (here, ordered, sign, first_keys, lengths, words, masses)
        _totals[(blocks,)](*elements, size, row_keys, half, **common)
        _running[(blocks,)](*elements, word_sums, mass_sums, size, row_keys, half, **common)
        _descend[(blocks + query_blocks,)](
            here, moved, when, ordered, first_keys, lengths, word_sums, mass_sums,
            sums, counts, nodes, arrived, budgets, size, row_keys, heads, half, blocks,
            LEAF=leaf, **common,
        )  # fmt: skip
        here, moved = moved, here
        half //= 2
    _finish[(triton.cdiv(keys, 32),)](
        e, order, when, ordered, sign, first_keys, lengths, centre, skipped,
        sums, counts, nodes, arrived, budgets, tau, keys, row_keys, heads, window,
        LEAF=leaf, PACKED=geometry.packed, OUTSIDE=outside is not None,
        BLOCK=32, WIDTH=32, num_warps=4,
    )  # fmt: skip
    return tau.view(batch, heads, row_keys)
