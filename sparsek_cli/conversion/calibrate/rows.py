"""Which rows of a calibration sequence are looked at, and for what."""

from __future__ import annotations

import numpy as np
import torch

from sparsek_cli.conversion.calibrate.sequences.sequence import Sequence
from sparsek_cli.conversion.planned import Plan

# Keys of the last part have too few later queries for their largest attention to mean much.
_LAST_PART = 8


def end_of_valued(tokens: int, window: int) -> int:
    """Where the keys of plain text end whose later queries say what they are worth."""
    return tokens - window - tokens // _LAST_PART


def valued_keys(sequence: Sequence, plan: Plan) -> torch.Tensor:
    """int64 places of the keys whose later queries say what they are worth."""
    first, window = plan.sinks, plan.window
    if sequence.told is not None:
        told = np.flatnonzero(sequence.told)
        return torch.from_numpy(told[(told >= first) & (told < sequence.context - window)])
    if sequence.is_recall:
        # Keys that every answer could have looked at.
        last = int(np.flatnonzero(sequence.answer)[0]) - window
    else:
        last = end_of_valued(sequence.context, window)
    return torch.arange(first, max(first + 1, last))


def target_rows(sequence: Sequence, count: int, generator: np.random.Generator) -> torch.Tensor:
    """int64 queries that form a target: one of each of `count` equal parts, and every answer."""
    tokens = sequence.context
    if count >= tokens:
        return torch.arange(len(sequence.ids))
    edges = np.linspace(0, tokens, count + 1)
    drawn = (edges[:-1] + generator.random(count) * np.diff(edges)).astype(np.int64)
    answers = np.flatnonzero(sequence.answer)
    return torch.from_numpy(np.union1d(drawn, answers))


def text_rows(sequence: Sequence, budget: int) -> np.ndarray:
    """int64 rows of running text; before the budget is full nothing has been dropped."""
    tokens = sequence.context
    text = np.arange(min(budget, tokens // 2), tokens)
    return np.setdiff1d(text, np.flatnonzero(sequence.answer | sequence.asking))


def error_rows(
    sequence: Sequence, budget: int, most: tuple[int, int], generator: np.random.Generator
) -> torch.Tensor:
    """int64 queries at which candidates are compared; `most` in text and at answers."""
    drawn = [
        generator.choice(some, size=min(count, len(some)), replace=False)
        for count, some in zip(
            most,
            (text_rows(sequence, budget), np.flatnonzero(sequence.answer)),
            strict=True,
        )
    ]
    return torch.from_numpy(np.unique(np.concatenate(drawn)).astype(np.int64))
