"""Scores that are no numbers, on all ways: NaN is never selected, +inf is the largest number."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from sparsek_kernels import SparseKState, StateRows, sparsek_attention
from sparsek_kernels.dispatch import as_if_long
from sparsek_kernels.scores import LARGEST
from sparsek_kernels.triton.decode import step as steps_of
from sparsek_kernels.triton.geometry import geometry
from sparsek_kernels.triton.selection import selection_ends

pytestmark = pytest.mark.interpret

SHAPE = dict(topk=(5, 3), window=3, sinks=2)
N = 60
KINDS = {
    "some": torch.tensor([0.5, torch.nan, torch.inf, -torch.nan, -torch.inf, 2.0, 1.0]),
    "nan": torch.tensor([torch.nan]),
    "+inf": torch.tensor([torch.inf]),
}


def drawn(kind, batch=1):
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(batch, 4, N, 16, generator=draw)
    k, v = (torch.randn(batch, 2, N, 16, generator=draw) for _ in range(2))
    values = KINDS[kind]
    scores = values[torch.randint(0, len(values), (batch, 2, N), generator=draw)]
    ordered = scores.double().nan_to_num(nan=-torch.inf, posinf=LARGEST, neginf=-torch.inf)
    return q, k, v, scores, ordered


def whole(q, k, v, scores, **options):
    bounds = torch.tensor([0, 20, N], dtype=torch.int32)
    one = [x[:1] for x in (q, k, v, scores)]
    packed = sparsek_attention(*one, cu_seqlens=bounds, **options)
    return [sparsek_attention(q, k, v, scores, **options), packed]


def pieces(q, k, v, scores, *, fresh, **options):
    """Outputs and states of rows read in pieces and by steps, and of rows of a pool."""
    state = SparseKState.empty(q.shape[0], 2, 16, **SHAPE)
    pool = SparseKState.empty(3, 2, 16, **SHAPE)
    rows, found, at = torch.tensor([2, 0]), [], 0
    for size in (30, 1, 20, 1, 8):
        q1, k1, v1, scores1 = (x[:, :, at : at + size] for x in (q, k, v, scores))
        more = dict(state=state, fresh=fresh and not at, **options)
        out, state = sparsek_attention(q1, k1, v1, scores1, **more)
        found.append(out)
        one = [x[:1] for x in (q1, k1, v1, scores1)]
        bounds = torch.tensor([0, size // 3, size], dtype=torch.int32)
        known = StateRows(pool, rows, torch.full((2,), not at))
        found.append(sparsek_attention(*one, state=known, cu_seqlens=bounds, **options)[0])
        at += size
    return [*found, *state.slots.values(), *pool.slots.values()]


@torch.no_grad()
@pytest.mark.parametrize("long", [False, True], ids=["short", "long"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_orders_them_as_the_numbers_that_they_stand_for(relative_error, kind, long):
    q, k, v, scores, ordered = drawn(kind)
    found = {}
    for backend in ("triton", "pytorch"):
        options = dict(**SHAPE, slopes=torch.tensor([0.0, 0.02]), backend=backend)
        with as_if_long() if long else nullcontext():
            for way in (whole, partial(pieces, fresh=True)):
                outs, expected = way(q, k, v, scores, **options), way(q, k, v, ordered, **options)
                assert all(torch.equal(a, b) for a, b in zip(outs, expected, strict=True))
                found.setdefault(backend, []).extend(outs)
    for a, b in zip(found["triton"], found["pytorch"], strict=True):
        assert a.dim() < 4 or relative_error(a, b) < 1e-5  # slots may hold keys in another order


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_steps_of_many_rows_order_them_alike(monkeypatch, kind):
    monkeypatch.setattr(steps_of, "ONE_LAUNCH_ROWS", 0)
    q, k, v, scores, ordered = drawn(kind, batch=2)
    options = dict(**SHAPE, slopes=torch.tensor([0.0, 0.02]), backend="triton")
    states = [SparseKState.empty(2, 2, 16, **SHAPE) for _ in range(2)]
    for t in range(20):
        q1, k1, v1, odd, plain = (x[:, :, t : t + 1] for x in (q, k, v, scores, ordered))
        out, _ = sparsek_attention(q1, k1, v1, odd, state=states[0], **options)
        expected, _ = sparsek_attention(q1, k1, v1, plain, state=states[1], **options)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_selection_of_many_keys_fills_no_list_too_far_whoever_calls_it(sign):
    scores = torch.full((1, 1, 300), torch.nan).double().copysign(torch.tensor(sign))
    shape = geometry((1, 1, 300, 8), (1, 1, 300, 8), torch.device("cpu"))
    assert not selection_ends(scores, (5,), 4, shape).any()
