"""Keys that score -inf, or NaN, are never selected and no candidates, however the text is fed."""

from __future__ import annotations

import math

import pytest
import torch
from sparsek_kernels import GATES, SparseKState, sparsek_attention
from sparsek_kernels.naive.attention import naive_attention

N = 48


def threshold(values: list[float], k: int) -> float:
    """tau with sum of clip(value - tau, 0, 1) = k, by bisection; -inf up to k values."""
    if len(values) <= k:
        return -math.inf
    low, high = min(values) - 1, max(values)
    for _ in range(200):
        middle = (low + high) / 2
        mass = sum(min(max(value - middle, 0.0), 1.0) for value in values)
        low, high = (middle, high) if mass > k else (low, middle)
    return high


def expected(q, k, v, scores, *, topk: int, window: int, sinks: int, gate: str) -> torch.Tensor:
    """[N, D] of one head in plain Python: no code of the package."""
    rows = []
    for t in range(len(q)):
        seen = [j for j in range(sinks, t - window + 1) if scores[j] > -math.inf]
        best = sorted(seen, key=lambda j: (-scores[j], j))[:topk]
        tau = threshold([scores[j] for j in seen], topk)
        always = [j for j in range(t + 1) if j < sinks or j > t - window]
        gates = dict.fromkeys(always, 1.0) | {j: min(max(scores[j] - tau, 0), 1) for j in best}
        if gate == "straight_through":
            gates = dict.fromkeys(gates, 1.0)
        logits = {j: float(q[t] @ k[j]) / math.sqrt(q.shape[1]) for j in gates}
        if gate == "kv":
            logits = {j: gates[j] * logit for j, logit in logits.items()}
        weights = {j: math.exp(logit) for j, logit in logits.items()}
        if gate == "log":
            weights = {j: gates[j] * weight for j, weight in weights.items()}
        scale = {j: gates[j] if gate == "kv" else 1.0 for j in gates}
        total = sum(weights.values())
        rows.append(sum(weights[j] * scale[j] / total * v[j] for j in gates))
    return torch.stack(rows)


def inputs(share: float, seed: int = 0):
    """q, k, v, scores of one head; `share` of the scores -inf, the later ones lower."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 1, N, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    scores = torch.randn(1, 1, N, generator=generator, dtype=torch.float64)
    scores[..., N // 2 :] -= 3
    banned = torch.rand(1, 1, N, generator=generator) < share
    return q, k, v, scores.masked_fill(banned, -torch.inf)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("share", [0.3, 0.8, 1.0])
@pytest.mark.parametrize("settings", [(8, 1, 0), (3, 5, 2), (40, 2, 1)])
def test_pieces_equal_plain_python(settings, share, gate):
    q, k, v, scores = inputs(share)
    topk, window, sinks = settings
    options = dict(topk=topk, window=window, sinks=sinks, gate=gate)
    wanted = expected(q[0, 0], k[0, 0], v[0, 0], scores[0, 0].tolist(), **options)
    close = dict(atol=1e-9, rtol=0)
    torch.testing.assert_close(sparsek_attention(q, k, v, scores, **options)[0, 0], wanted, **close)
    torch.testing.assert_close(naive_attention(q, k, v, scores, **options)[0, 0], wanted, **close)
    for cuts in ([1] * N, [17, 1, 1, 20, 9], [9, 39]):
        state = SparseKState.empty(
            1, 1, 4, topk=topk, window=window, sinks=sinks, dtype=torch.float64
        )
        pieces, at = [], 0
        for size in cuts:
            part = [x[:, :, at : at + size] for x in (q, k, v, scores)]
            piece, state = sparsek_attention(*part, state=state, **options)
            pieces.append(piece)
            at += size
        torch.testing.assert_close(torch.cat(pieces, 2)[0, 0], wanted, **close)


@pytest.mark.parametrize("large", [torch.inf, 1e20])
@pytest.mark.parametrize("gate", GATES)
def test_scores_too_large_for_a_threshold_are_refused_where_one_is_needed(gate, large):
    """Gates and gradients were NaN, or silently other ones."""
    q, k, v, scores = inputs(0.0)
    scores[..., 5:9] = large
    options = {"window": 3, "sinks": 2, "gate": gate, "backend": "pytorch"}
    with pytest.raises(ValueError, match="scores above 1e.09, .inf among them, have no"):
        sparsek_attention(q, k, v, scores.clone().requires_grad_(), topk=8, **options)
    # Where nothing is left out there is no threshold, and the plain softmax wants none.
    assert sparsek_attention(q, k, v, scores, topk=q.shape[2], **options).isfinite().all()
    if gate == "straight_through":
        found = sparsek_attention(q, k, v, scores, topk=8, **options)
        bounded = sparsek_attention(q, k, v, scores.clamp(max=100.0), topk=8, **options)
        assert torch.equal(found, bounded)
    # What never becomes a candidate does not matter.
    scores[..., 5:9], scores[..., :2], scores[..., -3:] = 0.0, large, large
    assert sparsek_attention(q, k, v, scores, topk=8, **options).isfinite().all()


@pytest.mark.parametrize("gate", GATES)
def test_a_score_of_nan_has_the_outputs_and_gradients_of_minus_infinity(gate):
    q, k, v, scores = inputs(0.3)
    found = []
    for banned in (-torch.inf, torch.nan):
        given = [x.clone().requires_grad_() for x in (q, k, v, scores.nan_to_num(neginf=banned))]
        out = sparsek_attention(*given, topk=8, window=3, sinks=2, gate=gate)
        found.append([out, *torch.autograd.grad(out.square().sum(), given)])
    assert found[0][0].isfinite().all() and found[0][4].any()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
