"""The error of a difference between two runs on the same prompts."""

import math

import numpy as np
import pytest

from sparsek_cli.evaluation.report.paired_stderr import paired_error


def samples(scores, metric="acc", wanted="none", start=0):
    return [
        {"doc_id": i, "prompt_hash": f"p{i}", "filter": wanted, "scores": {metric: score}}
        for i, score in enumerate(scores, start)
    ]


def test_equal_runs_differ_by_nothing_for_sure():
    assert paired_error(samples([1, 0, 1]), samples([1, 0, 1]), "acc") == 0.0


def test_numbers_are_paired():
    a, b = np.random.default_rng(0).random((2, 40))
    wanted = np.std(b - a, ddof=1) / 40**0.5
    found = paired_error(samples(a.tolist()), samples(b.tolist()), "acc")
    assert found == pytest.approx(wanted)


def test_perplexities_are_paired_by_the_delta_method():
    """Against drawing the passages again and again."""
    rng = np.random.default_rng(1)
    loss = rng.normal(3.5, 0.5, 60)
    worse = loss + rng.normal(0.02, 0.01, 60)
    rows = [[[-x * 500, 500] for x in column] for column in (loss, worse)]
    found = paired_error(*(samples(row, "ppl") for row in rows), "ppl")
    again = []
    for _ in range(4000):
        chosen = rng.integers(60, size=60)
        again.append(math.exp(worse[chosen].mean()) - math.exp(loss[chosen].mean()))
    assert found == pytest.approx(np.std(again), rel=0.1)
    alone = math.exp(loss.mean()) * np.std(loss, ddof=1) / 60**0.5
    assert found < alone / 5


@pytest.mark.parametrize(
    ("first", "second", "metric"),
    [
        (samples([1, 0]), samples([1, 0], start=1), "acc"),  # other prompts
        (samples([1]), samples([0]), "acc"),
        (samples([1, 0]), samples([1, 0, 1]), "acc"),
        (samples([["text", ["answer"]]] * 3), samples([["text", ["answer"]]] * 3), "acc"),
        ([], [], "acc"),
        (samples([1, 0]), samples([1, 0]), "f1"),
    ],
)
def test_what_cannot_be_paired_is_not(first, second, metric):
    assert paired_error(first, second, metric) is None


def test_filters_and_absent_scores():
    both = [samples([1, 0, 1], "em", "strict") + samples([0, 0, 0], "em", "loose")] * 2
    assert paired_error(*both, "em,strict") == 0.0
    some = samples([1.0, None, 0.0], "exact_heldout")
    assert paired_error(some, some, "exact_heldout") == 0.0
