"""Exact prefix selection: ends, key lists and thresholds against the naive twins."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sparsek_kernels.naive.attention import naive_selection
from sparsek_kernels.pytorch import thresholds
from sparsek_kernels.triton import pipeline
from sparsek_kernels.triton.geometry import geometry
from sparsek_kernels.triton.lists import key_lists
from sparsek_kernels.triton.selection import selection_ends
from sparsek_kernels.triton.thresholds import descent
from sparsek_kernels.triton.thresholds.descent import prefix_thresholds

pytestmark = pytest.mark.interpret

CASES = [  # n, k, window, sinks, kind of scores
    (1, 1, 1, 0, "normal"),
    (63, 5, 1, 0, "ties"),
    (64, 64, 3, 1, "normal"),
    (65, 1, 4, 2, "equal"),
    (127, 20, 16, 4, "offset"),
    (300, 150, 2, 0, "rising"),
    (300, 3, 1, 0, "falling"),
    (401, 7, 40, 3, "ties"),
]
FINE = ("ties", "wide")


def ends_of(scores, topk, window, sinks, cu_seqlens=None):
    """`end` int32 [B, G, N] of scores [B, G, N]."""
    batch, heads, n = scores.shape
    shape = geometry((batch, heads, n, 1), (batch, heads, n, 1), scores.device, cu_seqlens)
    always = pipeline.sink_mask(shape, sinks)
    return selection_ends(scores.double(), topk, window, shape, always=always), shape


def seen_as_selected(end, window, sinks):
    """[N, N] bool from one head's `end`: query t (row) sees key j as a selected key."""
    n = end.shape[0]
    t, j = torch.arange(n)[:, None], torch.arange(n)
    return (t >= j + window) & (t < end) & (j >= sinks)


@pytest.mark.parametrize("n, k, window, sinks, kind", CASES)
def test_ends_match_the_naive_selection(make_inputs, n, k, window, sinks, kind):
    batch = 2 if n < 100 else 1
    scores = make_inputs(n, groups=2, heads=2, batch=batch, kind=kind, grad=False)[3]
    end, _ = ends_of(scores, (k, k), window, sinks)
    for b in range(batch):
        for g in range(2):
            wanted = naive_selection(scores[b, g].double(), k, window, sinks)
            assert torch.equal(seen_as_selected(end[b, g], window, sinks), wanted)


def test_every_head_has_its_own_budget(make_inputs):
    scores = make_inputs(200, groups=3, heads=3, grad=False)[3]
    end, _ = ends_of(scores, (0, 9, 200), 3, 1)
    for g, k in enumerate((0, 9, 200)):
        wanted = naive_selection(scores[0, g], k, 3, 1)
        assert torch.equal(seen_as_selected(end[0, g], 3, 1), wanted)


def test_documents_are_selected_on_their_own(make_inputs):
    bounds = [0, 1, 2, 70, 70, 200]
    scores = make_inputs(200, groups=2, kind="ties", grad=False)[3]
    end, _ = ends_of(scores, (6, 2), 4, 2, torch.tensor(bounds, dtype=torch.int32))
    for first, last in zip(bounds, bounds[1:], strict=False):
        if first == last:
            continue
        for g, k in enumerate((6, 2)):
            wanted = naive_selection(scores[0, g, first:last], k, 4, 2)
            mine = end[0, g, first:last].long() - first
            assert torch.equal(seen_as_selected(mine, 4, 2), wanted)


@given(
    n=st.integers(2, 160), k=st.integers(1, 40), window=st.integers(1, 20),
    sinks=st.integers(0, 4), levels=st.integers(1, 60), seed=st.integers(0, 999),
)  # fmt: skip
@settings(
    max_examples=12, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
def test_any_shape(n, k, window, sinks, levels, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, levels, (1, 1, n), generator=generator).double()
    end, _ = ends_of(scores, (k,), window, sinks)
    wanted = naive_selection(scores[0, 0], k, window, sinks)
    assert torch.equal(seen_as_selected(end[0, 0], window, sinks), wanted)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("with_runs", [False, True])
def test_lists_hold_exactly_the_keys_of_their_tile(make_inputs, packed, with_runs):
    n, window, sinks, topk = 700, 9, 2, (20, 5)
    bounds = torch.tensor([0, 30, 31, 700], dtype=torch.int32) if packed else None
    scores = make_inputs(n, groups=2, kind="rising", grad=False)[3]
    end, shape = ends_of(scores, topk, window, sinks, bounds)
    # Any runs will do: some lie inside a tile, some cover it, some are empty.
    draw = torch.Generator().manual_seed(0)
    starts, stops = torch.randint(0, n, (2, *end.shape), generator=draw, dtype=torch.int32)
    runs = (starts, stops) if with_runs else None
    fine, coarse = key_lists(end, topk, window, sinks, shape, [32, 256], runs)
    for lists in (fine, coarse):
        for tile, (sequence, place) in enumerate(lists.tiles.tolist()):
            if sequence < 0:
                continue
            _, first, count, *_ = shape.sequences[sequence].tolist()
            t0 = first + place * lists.size
            t1 = min(t0 + lists.size, first + count)
            for head in range(2):
                one = tile * 2 + head
                low, high = lists.offsets[one : one + 2].tolist()
                front, back = lists.counts[one].tolist()
                whole = set(lists.keys[low : low + front].tolist())
                part = set(lists.keys[high - back : high].tolist())
                j = torch.arange(first, first + count)
                stop = end[0, head, first : first + count]
                live = (stop > t0) & (j + window < t1) & (stop > j + window)
                every = live & (stop >= t1) & (j + window <= t0)
                if with_runs:
                    t = torch.arange(t0, t1)[:, None]
                    interior = (t >= starts[0, head, j]) & (t < stops[0, head, j])
                    every &= interior.all(0) | ~interior.any(0)
                assert whole == set(j[every].tolist())
                assert part == set(j[live & ~every].tolist())
                assert len(whole) == front and len(part) == back


@pytest.mark.parametrize(
    "n, leaf, kind",
    [
        # How leaves are walked does not depend on the kind: the finer ones meet ties and stretches.
        pytest.param(
            n, leaf, kind,
            marks=[pytest.mark.slow] if (n, leaf) == (300, 32) and kind not in FINE else [],
        )
        for n, leaf in [(2, 128), (63, 128), (64, 32), (65, 128), (300, 128), (300, 32)]
        for kind in ("normal", "ties", "equal", "offset", "wide")
    ],
)  # fmt: skip
def test_thresholds_equal_those_of_the_pytorch_backend(monkeypatch, make_inputs, n, leaf, kind):
    """Except on a stretch of solutions, where no key may be interior; wide scores have many."""
    monkeypatch.setattr(descent, "LEAVES", ((0, leaf),))
    monkeypatch.setattr(descent, "SUMS", ((0, 2 * leaf),))  # rows of several blocks
    topk, window, sinks = (5, 40), 3, 2
    scores = make_inputs(n, heads=2, groups=2, kind=kind, grad=False)[3]
    shape = geometry((1, 2, n, 1), (1, 2, n, 1), scores.device)
    tau = prefix_thresholds(scores, topk, window, shape, sinks)[0]
    candidates = scores[0].clone()
    candidates[:, :sinks] = -torch.inf
    wanted = torch.full_like(tau, -torch.inf)
    # The candidates of query t are the keys up to t - window.
    found = thresholds.prefix_thresholds(candidates, torch.tensor(topk))
    wanted[:, window:] = found[:, : max(0, n - window)]
    assert torch.equal(tau.isfinite(), wanted.isfinite())
    assert (tau[:, 1:] >= tau[:, :-1] - 1e-12).all()
    for head, k in enumerate(topk):
        for t in tau[head].isfinite().nonzero()[:, 0].tolist():
            u = candidates[head, : t - window + 1].sort(descending=True).values
            if u[k - 1] - u[k] >= 1:
                assert not ((u > tau[head, t]) & (u - 1 < tau[head, t])).any()
            else:
                assert abs(tau[head, t] - wanted[head, t]) < 1e-8
