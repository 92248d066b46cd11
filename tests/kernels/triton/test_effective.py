"""Effective scores by one launch are those of PyTorch's operations, and keep nothing beside."""

import pytest
import torch
from sparsek_kernels.scores import effective_scores as twin
from sparsek_kernels.triton.effective import BLOCK, effective_scores

WHERE = pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
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
    found, gradients = [], []
    for made, where_from in ((effective_scores, cu_seqlens), (twin, places)):
        scores = scores_of(tokens, batch, dtype, by_token, where).requires_grad_()
        slopes = SLOPES.to(where, copy=True).requires_grad_() if sloped else None
        out = made(scores, slopes, where_from)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
        out.backward(grad.to(where))
        found.append(out.detach())
        gradients.append((scores.grad, slopes.grad if sloped else None))
    assert torch.equal(*found)
    (own, own_slopes), (expected, expected_slopes) = gradients
    assert own.dtype == dtype
    # The interpreter cuts where PyTorch rounds to halves.
    torch.testing.assert_close(own, expected, rtol=2**-7 * (dtype == torch.bfloat16), atol=0)
    if sloped:
        torch.testing.assert_close(own_slopes, expected_slopes, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("learns", ["scores", "slopes", "nothing"])
def test_what_does_not_learn_gets_no_gradient(learns):
    scores, slopes = torch.randn(1, 3, 50), SLOPES.clone()
    given = {"scores": scores, "slopes": slopes}
    if learns == "nothing":
        assert not effective_scores(scores, slopes, None).requires_grad
        return
    given[learns].requires_grad_()
    effective_scores(scores, slopes, None).sum().backward()
    assert [name for name, tensor in given.items() if tensor.grad is not None] == [learns]


def test_nothing_is_kept_for_the_gradient_but_the_result():
    kept = []
    scores, slopes = torch.randn(1, 3, 64, requires_grad=True), SLOPES.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out = effective_scores(scores, slopes, None)
    assert {x.data_ptr() for x in kept} == {out.data_ptr()}
