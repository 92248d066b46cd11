"""Effective scores by one launch are those of PyTorch's operations, and keep nothing beside."""

from contextlib import nullcontext

import pytest
import torch
from sparsek_kernels import sparsek_attention
from sparsek_kernels.dispatch import as_if_long
from sparsek_kernels.scores import effective_scores as twin
from sparsek_kernels.triton.effective import BLOCK, effective_gradients, effective_scores
from sparsek_kernels.triton.geometry import geometry

CPU = pytest.param("cpu", marks=pytest.mark.interpret)
WHERE = pytest.mark.parametrize("where", [CPU, pytest.param("cuda", marks=pytest.mark.gpu)])
SLOPES = torch.tensor([0.0173, -0.3, 1e-3])


def scores_of(tokens, batch, dtype, by_token, where):
    """[B, 3, N], as scorers leave them (`by_token`) or in order, some of them not finite."""
    scores = 3 * torch.randn(batch, tokens, 3, generator=torch.Generator().manual_seed(tokens))
    for at, odd in enumerate((torch.nan, -torch.inf, torch.inf)):
        scores[:, at :: 5 + at, at] = odd
    scores = scores.to(dtype).to(where).transpose(1, 2)
    return scores if by_token else scores.contiguous()


def places_of(tokens, bounds, where):
    if bounds is None:
        return torch.arange(tokens, device=where), None
    lengths = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
    places = torch.cat([torch.arange(length) for length in lengths])
    return places.to(where), torch.tensor(bounds, dtype=torch.int32, device=where)


@WHERE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("sloped", [True, False], ids=["slopes", "none"])
@pytest.mark.parametrize(
    "tokens, batch, bounds, by_token",
    [(1, 2, None, True), (BLOCK, 1, None, False), (BLOCK + 37, 3, None, True),
     (700, 1, (0, 1, 300, 300, 700), True)],
)  # fmt: skip
def test_scores_and_gradients_are_the_twin_s(where, dtype, sloped, tokens, batch, bounds, by_token):
    places, cu_seqlens = places_of(tokens, bounds, where)
    scores = scores_of(tokens, batch, dtype, by_token, where).requires_grad_()
    slopes = SLOPES.to(where, copy=True).requires_grad_() if sloped else None
    expected = twin(scores, slopes, places)
    keys = scores[..., None].shape
    shape = geometry(keys, keys, scores.device, cu_seqlens)
    found = effective_scores(scores.detach(), slopes, shape)
    assert torch.equal(found, expected)
    grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).double().to(where)
    expected.backward(grad)
    kinds = {"scores": dtype, "by_token": by_token, "slopes": torch.float32 if sloped else None}
    own, own_slopes = effective_gradients(grad, found, shape, **kinds)
    assert own.dtype == dtype and own.stride() == scores.stride()
    # The interpreter cuts where PyTorch rounds to halves.
    rtol = 2**-7 * (dtype == torch.bfloat16)
    torch.testing.assert_close(own, scores.grad, rtol=rtol, atol=0)
    if sloped:
        torch.testing.assert_close(own_slopes, slopes.grad, rtol=1e-6, atol=1e-6)


def attended(scores, slopes, backend="triton", q=None, **options):
    """Of queries (unless given), keys and values that are the same at every call."""
    seed = torch.Generator().manual_seed(0)
    own, k, v = (torch.randn(1, heads, 60, 16, generator=seed) for heads in (6, 3, 3))
    q = own if q is None else q
    shape = {"topk": 5, "window": 4, "sinks": 2}
    return sparsek_attention(q, k, v, scores, slopes=slopes, backend=backend, **shape, **options)


@pytest.mark.interpret
@pytest.mark.parametrize("learns", [(), ("scores",), ("slopes",), ("scores", "slopes")])
def test_who_does_not_learn_gets_no_gradient(learns):
    given = {"scores": torch.randn(1, 3, 60), "slopes": SLOPES.clone()}
    for name in learns:
        given[name].requires_grad_()
    out = attended(**given)
    assert out.requires_grad == bool(learns)
    if learns:
        out.sum().backward()
    assert {name for name, tensor in given.items() if tensor.grad is not None} == set(learns)


@pytest.mark.interpret
@pytest.mark.parametrize("long", [False, True], ids=["short", "long"])
@pytest.mark.parametrize("bounds", [None, [0, 23, 60]], ids=["one row", "documents"])
def test_scores_that_sinks_have_move_nothing(long, bounds):
    """They are +inf where ends are found on the way to them, and what they are where not."""
    options = {}
    if bounds:
        options["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32)
    gradients = []
    for backend in ("triton", "pytorch"):
        scores = torch.randn(1, 3, 60, generator=torch.Generator().manual_seed(1)).requires_grad_()
        slopes = SLOPES.clone().requires_grad_()
        with as_if_long() if long else nullcontext():
            attended(scores, slopes, backend, **options).square().sum().backward()
        first = [0, 1, *([23, 24] if bounds else [])]
        assert (scores.grad[..., first] == 0).all()
        gradients.append((scores.grad, slopes.grad))
    for own, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)


LEARN, FROZEN = ("scores", "slopes"), ()


@pytest.mark.interpret
@pytest.mark.parametrize(
    "learns, gate, long, kept",
    [
        (LEARN, "straight_through", False, ["float64", "int32"]),  # effective ones, and ends
        (LEARN, "straight_through", True, ["float32", "int32"]),  # as they were given
        (FROZEN, "straight_through", False, ["int32"]),
        (FROZEN, "straight_through", True, ["int32"]),
        (FROZEN, "log", True, ["float32", "float64", "int32"]),  # and tau
    ],
)
def test_of_scores_no_more_is_kept_than_their_gradient_takes(learns, gate, long, kept):
    found = []
    given = {"scores": torch.randn(1, 3, 60), "slopes": SLOPES.clone()}
    for name in learns:
        given[name].requires_grad_()
    q = torch.randn(1, 6, 60, 16, requires_grad=True)
    keep = torch.autograd.graph.saved_tensors_hooks(lambda x: found.append(x) or x, lambda x: x)
    with keep, as_if_long() if long else nullcontext():
        attended(**given, gate=gate, q=q).sum().backward()
    assert q.grad.abs().sum() > 0
    by_key = [x for x in found if x.shape == given["scores"].shape]
    assert sorted(str(x.dtype).removeprefix("torch.") for x in by_key) == kept
