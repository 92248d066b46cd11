"""Calibration's parts against plain definitions: targets, what is kept, output errors, maps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparsek_cli.conversion.calibrate.head_budgets.by_error import allot
from sparsek_cli.conversion.calibrate.recorded import Recorded
from sparsek_cli.conversion.calibrate.scorers.ridge import SPREAD, Moments, ridge
from sparsek_cli.conversion.calibrate.scorers.targets import FLOOR, future_attention
from sparsek_cli.conversion.calibrate.sensitivity.output_error import (
    Slots,
    always_visible,
    output_errors,
    prefix_ranks,
)
from sparsek_cli.models.logits import Logits

HEADS, GROUPS, TOKENS, SIZE, WINDOW = 4, 2, 37, 8, 5


@pytest.fixture(params=["plain", "capped, with sinks"])
def recorded(request) -> Recorded:
    torch.manual_seed(0)
    own = {} if request.param == "plain" else {"softcap": 2.0, "sinks": torch.arange(HEADS) - 1.0}
    return Recorded(
        inputs=torch.randn(TOKENS, 16),
        query=3 * torch.randn(HEADS, TOKENS, SIZE),
        key=torch.randn(GROUPS, TOKENS, SIZE),
        value=torch.randn(GROUPS, TOKENS, SIZE),
        logits=Logits(SIZE**-0.5, **own),
    )


def dense_weights(recorded: Recorded) -> torch.Tensor:
    """[G, heads of the group, N, N] attention probabilities."""
    key = recorded.key.repeat_interleave(HEADS // GROUPS, 0)
    logits = recorded.query @ key.transpose(1, 2) * recorded.logits.scale
    own = recorded.logits
    if own.softcap is not None:
        logits = own.softcap * (logits / own.softcap).tanh()
    later = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    weights = logits.masked_fill(later, -torch.inf).exp()
    total = weights.sum(-1, keepdim=True)
    if own.sinks is not None:
        total = total + own.sinks[:, None, None].exp()
    return (weights / total).view(GROUPS, -1, TOKENS, TOKENS)


def largest(probabilities: torch.Tensor) -> torch.Tensor:
    return probabilities.amax((0, 1))


def mean(probabilities: torch.Tensor) -> torch.Tensor:
    return probabilities.mean((0, 1))


def p99(probabilities: torch.Tensor) -> torch.Tensor:
    """Of fewer than 100 queries the largest, of 100 to 199 the second."""
    best = probabilities.amax(0)
    return best.sort(dim=0, descending=True).values[len(best) // 100]


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("reduce", [largest, mean, p99])
def test_targets_equal_the_definition(recorded, step, reduce, monkeypatch):
    from sparsek_cli.conversion.calibrate.scorers import targets

    monkeypatch.setattr(targets, "_BLOCK", {"cpu": 7})
    rows = torch.arange(0, TOKENS, step)
    answer = torch.zeros(TOKENS, dtype=torch.bool)
    answer[[21, 30, 36]] = True
    target = {largest: "max", mean: "mean", p99: "p99"}[reduce]
    best, best_answer = future_attention(recorded, rows, answer, WINDOW, target)
    weights = dense_weights(recorded)
    for result, chosen in ((best, rows), (best_answer, rows[answer[rows]])):
        expected = torch.full((GROUPS, TOKENS), FLOOR)
        for key in range(TOKENS):
            later = chosen[chosen >= key + WINDOW]
            for group in range(GROUPS if len(later) else 0):
                expected[group, key] = reduce(weights[group, :, later, key]).log()
        assert torch.allclose(result, expected.clamp_min(FLOOR), atol=1e-5)


def test_a_percentile_leaves_the_largest_out():
    from sparsek_cli.conversion.calibrate.scorers.targets import REDUCTIONS

    logits = torch.rand(2, 3, 350, 4).log()
    reduction = REDUCTIONS["p99"](2, 4, logits.device)
    for part in logits.split(100, dim=2):
        reduction.add(part)
    expected = logits.amax(1).sort(dim=1, descending=True).values[:, 3]
    assert torch.equal(reduction.result(), expected)


def visible(effective, rows, slots, topk) -> torch.Tensor:
    ranks = prefix_ranks(effective, rows, slots)
    return (ranks <= topk) | always_visible(TOKENS, rows, slots)


@pytest.mark.parametrize("sinks", [0, 3])
def test_visible_keys_equal_the_definition(sinks):
    # Few distinct values: ties go to the earlier token.
    effective = torch.randint(0, 4, (3, TOKENS)).double()
    topk, slots = 6, Slots(WINDOW, sinks, (6,))
    rows = torch.tensor([0, 4, 9, 20, TOKENS - 1])
    seen = visible(effective, rows, slots, topk)
    for line in range(3):
        for number, t in enumerate(rows.tolist()):
            candidates = range(sinks, t - WINDOW + 1)
            best = sorted(candidates, key=lambda j: (-float(effective[line, j]), j))[:topk]
            expected = {j for j in range(t + 1) if j < sinks or j > t - WINDOW} | set(best)
            assert set(seen[line, number].nonzero().flatten().tolist()) == expected


def by_masks(monkeypatch, together: int = 8) -> None:
    """From here on output errors are computed as on an accelerator, some weights at once."""
    from sparsek_cli.conversion.calibrate.sensitivity import output_error

    monkeypatch.setattr(output_error, "_sums_in_order", output_error._sums_by_masks)
    monkeypatch.setattr(output_error, "_WEIGHTS", together * HEADS * 2 * TOKENS)


@pytest.mark.parametrize("together", [None, 1, 2, 8])
def test_output_error_equals_attention_over_the_kept_keys(recorded, together, monkeypatch):
    """In the order of scores (None), and by masks, however many candidates are computed at once."""
    if together:
        by_masks(monkeypatch, together)
    slots = Slots(WINDOW, sinks=1, sizes=(2, 4, TOKENS))
    effective = torch.randn(2, GROUPS, TOKENS).double()
    out_weight = torch.randn(HEADS * SIZE, 16)
    rows = torch.tensor([15, 30])
    errors = output_errors(recorded, effective, rows, slots, out_weight)
    weights = dense_weights(recorded)
    value = recorded.value[:, None]
    for candidate, level in ((0, 0), (0, 1), (1, 1), (1, 2)):
        seen = visible(effective[candidate], torch.arange(TOKENS), slots, slots.sizes[level])
        sparse = weights * seen[:, None]
        # What attends to nothing does so whatever is kept.
        sparse = sparse / (sparse.sum(-1, keepdim=True) + 1 - weights.sum(-1, keepdim=True))
        for group in range(GROUPS):
            part = out_weight.view(GROUPS, -1, 16)[group]

            def project(w, group=group, part=part):
                joined = (w[group] @ value[group]).transpose(0, 1).reshape(TOKENS, -1)
                return joined @ part

            difference = (project(sparse) - project(weights)).square().sum(-1)[rows]
            assert torch.allclose(errors[candidate, level, group], difference, atol=1e-4)
    assert float(errors[:, 2].max()) < 1e-8


@pytest.mark.parametrize("sinks", [0, 3])
def test_output_errors_are_the_same_in_order_and_by_masks(recorded, sinks, monkeypatch):
    """Of queries of all ages, in any order, where many scores are equal."""
    slots = Slots(WINDOW, sinks, sizes=(0, 1, 6, 20, TOKENS))
    effective = torch.randint(0, 4, (3, GROUPS, TOKENS)).double()
    effective[2] += 10 * torch.arange(TOKENS)
    out_weight = torch.randn(HEADS * SIZE, 16)
    for rows in (torch.arange(TOKENS), torch.tensor([0]), torch.tensor([30, 2, 36, 7, 9])):
        found = output_errors(recorded, effective, rows, slots, out_weight)
        with monkeypatch.context() as on:
            by_masks(on)
            expected = output_errors(recorded, effective, rows, slots, out_weight)
        assert found.shape == expected.shape == (3, 5, GROUPS, len(rows))
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
        # Where nothing is lost, nothing is rounded either.
        whole = (rows - WINDOW + 1 - sinks)[None] <= torch.tensor(slots.sizes)[:, None]
        assert not found.transpose(1, 2)[:, :, whole].any()


def test_slots_go_where_the_error_falls():
    sizes = (1, 2, 4, 8)
    flat = np.zeros(4)
    steep = np.array([8.0, 4.0, 2.0, 1.0])
    chosen = allot(np.stack([flat, steep, flat, flat]), sizes, 16)
    assert [sizes[c] for c in chosen][1] == 8
    assert sum(sizes[c] for c in chosen) <= 16
    rng = np.random.default_rng(0)
    for total in (5, 9, 17, 40):
        errors = np.sort(rng.random((5, 4)), axis=1)[:, ::-1]
        chosen = allot(errors, sizes, total)
        assert sum(sizes[c] for c in chosen) <= total
    assert allot(errors[:, :1], (7,), 35).tolist() == [0] * 5


def test_ridge_finds_a_planted_map_and_normalises_it():
    inputs = torch.randn(4000, 6) * torch.tensor([1, 5, 0.1, 1, 1, 2]) + 3.0
    weight = torch.randn(2, 6)
    targets = inputs @ weight.T - 7.0
    moments = Moments(6, 2, inputs.device)
    for part in (slice(0, 1000), slice(1000, 4000)):
        moments.add(inputs[part], targets[part])
    found = ridge(moments)
    assert torch.allclose(found.scores(inputs).T, targets, atol=0.1)
    scores = found.normalised(moments).scores(inputs)
    assert torch.allclose(scores.mean(1), torch.zeros(2), atol=1e-3)
    assert torch.allclose(scores.std(1), torch.full((2,), SPREAD), atol=1e-2)
    # Only scale and offset change: the order of the keys stays, but for what rounding makes equal.
    for before, after in zip(found.scores(inputs), scores, strict=True):
        assert (after[before.argsort()].diff() > -1e-5).all()
