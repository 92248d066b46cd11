"""Selection and lists of short calls against the ways that longer ones take."""

import functools

import pytest
import torch
from sparsek_kernels.scores import effective_scores
from sparsek_kernels.state import EMPTY
from sparsek_kernels.triton import pipeline
from sparsek_kernels.triton.geometry import geometry
from sparsek_kernels.triton.lists import key_lists
from sparsek_kernels.triton.selection import selection_ends
from sparsek_kernels.triton.short.ends import BLOCK, BLOCKS, short_ends
from sparsek_kernels.triton.short.limits import has_short_thresholds, is_short
from sparsek_kernels.triton.short.lists import short_lists

pytestmark = pytest.mark.interpret

KINDS = ("normal", "ties", "equal", "rising", "falling", "zeros")
LENGTHS = ([200], [0, 9, 0, 64, 64, 1, 1, 61, 0], [1] * 130 + [70])


def scores_of(kind, batch, heads, keys):
    draw = torch.Generator().manual_seed(keys)
    scores = torch.randn(batch, heads, keys, generator=draw)
    if kind == "ties":
        scores = scores.mul(1.5).round()
        scores[scores > 1] = -torch.inf
    elif kind == "equal":
        scores = torch.full_like(scores, 0.25)
    elif kind == "zeros":  # of both signs, which are equal
        scores = torch.where(scores > 0, 0.0, -0.0)
    elif kind in ("rising", "falling"):
        scores = scores + 0.05 * torch.arange(keys) * (1 if kind == "rising" else -1)
    return scores


def shapes(heads, keys, batch=1, lengths=None, queries=None):
    queries = queries or keys
    bounds = None if lengths is None else torch.tensor([0, *lengths]).cumsum(0).int()
    sizes = (batch, heads, queries, 8), (batch, heads, keys, 8)
    return geometry(*sizes, torch.device("cpu"), bounds)


def test_which_calls_are_short():
    assert is_short(shapes(8, 16_384)) and not is_short(shapes(9, 16_384))
    assert not is_short(shapes(1, 16_385)) and is_short(shapes(8, 4096, batch=16))
    assert has_short_thresholds(shapes(8, 12_288)) and not has_short_thresholds(shapes(8, 16_384))
    assert not has_short_thresholds(shapes(1, 16_385))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "topk, window, sinks", [((5, 40), 3, 2), ((0, 400), 1, 0), ((64, 1), 70, 5)]
)
def test_ends_of_batches(kind, topk, window, sinks):
    for n in (1, 63, 64, 65, 300):
        scores, shape = scores_of(kind, 2, 2, n), shapes(2, n, batch=2)
        always = pipeline.sink_mask(shape, sinks)
        expected = selection_ends(scores.double(), topk, window, shape, always=always)
        assert torch.equal(short_ends(scores, topk, window, shape, sinks=sinks), expected)


@pytest.mark.parametrize("kind", ["ties", "rising", "falling"])
def test_ends_where_several_blocks_are_searched_together(kind):
    n, topk, window = 3 * BLOCK * BLOCKS - 5, (70, 900), 3
    scores, shape = scores_of(kind, 1, 2, n), shapes(2, n)
    expected = selection_ends(scores.double(), topk, window, shape)
    assert torch.equal(short_ends(scores, topk, window, shape), expected)


@pytest.mark.parametrize(
    "kind, lengths",
    [(kind, LENGTHS[1]) for kind in KINDS] + [("ties", LENGTHS[0]), ("rising", LENGTHS[2])],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)} documents",
)
def test_ends_of_documents(kind, lengths):
    topk, window, sinks = (20, 3), 7, 2
    scores, shape = scores_of(kind, 1, 2, 200), shapes(2, 200, lengths=lengths)
    always = pipeline.sink_mask(shape, sinks)
    expected = selection_ends(scores.double(), topk, window, shape, always=always)
    assert torch.equal(short_ends(scores, topk, window, shape, sinks=sinks), expected)


def test_ends_of_listed_keys():
    """Sinks are known by their score; of a state's slots some are empty, those of sinks, too."""
    topk, window = (20, 3), 7
    for lengths in (None, LENGTHS[1]):
        scores = scores_of("ties", 1, 2, 200).double()
        positions = torch.arange(200).expand(1, 2, -1).clone()
        draw = torch.Generator().manual_seed(0)
        empty, sink = (torch.rand(1, 2, 200, generator=draw) < share for share in (0.3, 0.2))
        positions[empty] = EMPTY
        scores[empty] = -torch.inf
        scores[sink] = torch.inf
        shape = shapes(2, 200, lengths=lengths)
        expected = selection_ends(scores, topk, window, shape, always=sink, never=empty)
        found = short_ends(scores, topk, window, shape, positions=positions)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("lengths", [None, LENGTHS[1]], ids=["one row", "documents"])
def test_effective_scores_are_made_on_the_way(dtype, lengths):
    slopes, sinks, heads = torch.tensor([0.013, -0.3]), 3, 2
    scores = torch.randn(1, 200, heads).to(dtype).transpose(1, 2)  # as scorers leave them
    shape = shapes(heads, 200, lengths=lengths)
    places = torch.cat([torch.arange(length) for length in lengths or [200]])
    expected = effective_scores(scores, slopes, places).masked_fill(places < sinks, torch.inf)
    effective = torch.empty(expected.shape, dtype=torch.float64)
    end = short_ends(
        scores, (9, 30), 4, shape, sinks=sinks, slopes=slopes, effective=effective
    )  # fmt: skip
    assert torch.equal(effective, expected)
    positions = places.expand(1, heads, -1).contiguous()
    assert torch.equal(end, short_ends(expected, (9, 30), 4, shape, positions=positions))


@pytest.mark.parametrize("value", [float("nan"), -float("nan")])
def test_scores_that_are_no_numbers_fill_no_list_too_far(value):
    scores = torch.full((1, 1, 300), value)
    end = short_ends(scores, (5,), 4, shapes(1, 300))[0, 0]
    j = torch.arange(300)
    for t in range(300):
        assert ((j + 4 <= t) & (t < end)).sum() <= 5


def parts(lists, heads):
    """Of each list the keys at its front and those at its back, as they lie."""
    found = {}
    for tile, line in enumerate(lists.tiles.tolist()):
        for head in range(heads if line[0] >= 0 else 0):
            one = tile * heads + head
            low, high = lists.offsets[one : one + 2].tolist()
            front, back = lists.counts[one].tolist()
            keys = lists.keys[low : low + front], lists.keys[high - back : high]
            found[(*line, head)] = [part.tolist() for part in keys]
    unused = lists.tiles[:, 0] < 0
    assert not lists.counts.view(-1, heads, 2)[unused].any()
    return found


@functools.cache
def rising_ends(n, lengths, *options):
    """Found once for both sizes of tiles."""
    shape = shapes(2, n, lengths=lengths)
    return shape, short_ends(scores_of("rising", 1, 2, n), *options[:2], shape, sinks=options[2])


@pytest.mark.parametrize(
    "n, lengths", [(700, None), (2300, None), (2300, (0, 30, 1, 1500, 0, 769)), (700, (5,) * 140)],
    ids=["short", "longer than a coarse tile", "documents", "many documents"],
)  # fmt: skip
@pytest.mark.parametrize("size", [64, 1024])
def test_lists_are_those_of_the_ladder_in_their_order(n, lengths, size):
    topk, window, sinks = (60, 5), 9, 2
    shape, end = rising_ends(n, lengths, topk, window, sinks)
    (expected,) = key_lists(end, topk, window, sinks, shape, [size])
    found = short_lists(end, topk, window, sinks, shape, size)
    assert parts(found, 2) == parts(expected, 2)
    if size == 64 and lengths != (5,) * 140:  # both parts were there
        assert all(map(any, zip(*parts(found, 2).values(), strict=True)))
