"""How sure a difference is when both runs answered the same prompts.

Samples differ in difficulty far more than runs do, so the error of a difference is that of the
mean of the samples' own differences.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Any

Score = Any  # a number, or [log-likelihood, tokens] of a passage


def paired_error(
    first: Sequence[dict[str, Any]], second: Sequence[dict[str, Any]], metric: str
) -> float | None:
    """Standard error of `second`'s score minus `first`'s, from samples of the same prompts.

    Args:
        first, second: the samples of one task, length and policy, as the result folder has them.
        metric: its name in the results, with the filter after a comma where there are several.

    Returns:
        None where the prompts differ, where there are fewer than two, or where the score is not a
        mean over samples (nor the perplexity of passages).
    """
    ours, theirs = _scores(first, metric), _scores(second, metric)
    if ours.keys() != theirs.keys() or len(ours) < 2:
        return None
    pairs = [(ours[key], theirs[key]) for key in ours]
    if all(_is_number(score) for pair in pairs for score in pair):
        return _error([b - a for a, b in pairs])
    if all(_is_passage(score) for pair in pairs for score in pair):
        # By the delta method, as for one perplexity (ppl.py).
        ppl = [_perplexity([pair[side] for pair in pairs]) for side in (0, 1)]
        return _error([ppl[1] * _loss(b) - ppl[0] * _loss(a) for a, b in pairs])
    return None


def _scores(samples: Sequence[dict[str, Any]], metric: str) -> dict[tuple, Score]:
    """The score of every prompt that has one."""
    name, _, wanted = metric.partition(",")
    return {
        (sample["doc_id"], sample["prompt_hash"]): sample["scores"][name]
        for sample in samples
        if sample["filter"] == (wanted or "none") and sample["scores"].get(name) is not None
    }


def _is_number(score: Score) -> bool:
    return isinstance(score, int | float) and math.isfinite(score)


def _is_passage(score: Score) -> bool:
    pair = isinstance(score, list) and len(score) == 2 and all(map(_is_number, score))
    return pair and score[1] > 0 and -score[0] / score[1] < 700  # beyond, exp overflows


def _loss(passage: Score) -> float:
    return -passage[0] / passage[1]


def _perplexity(passages: Sequence[Score]) -> float:
    totals, counts = zip(*passages, strict=True)
    return math.exp(-sum(totals) / sum(counts))


def _error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))
