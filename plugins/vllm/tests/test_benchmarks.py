"""The benchmarks count what vLLM does, and say so where a model was not measured."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from in_turn import all_write, in_turn, sequences, steps

pytestmark = pytest.mark.core

BLOCKS, NEW = 6, 12


def test_as_many_requests_write_at_once_as_are_said_to_fit(checkpoint, run_engine):
    """One block is vLLM's own: with all counted there would be one more."""
    sizes = {"requests": 7, "prompt": 9, "new": NEW}
    with run_engine(checkpoint("qwen3"), num_gpu_blocks_override=BLOCKS) as llm:
        fit = sequences(llm, 9 + NEW)
        seen = list(steps(llm, **sizes, clock=time.perf_counter))
    assert fit == BLOCKS - 1
    assert max(sum(0 < done < NEW for done in written) for _, written in seen) == fit
    assert seen[-1][1] == [NEW] * 7 and not any(all_write(written, NEW) for _, written in seen)
    assert [now for now, _ in seen] == sorted(now for now, _ in seen)


def _rows(model: str, args: argparse.Namespace) -> None:
    Path(args.out, model).touch()
    if model == "bad":
        raise SystemExit(3)


def test_a_model_that_fails_is_named_and_the_next_one_measured(tmp_path):
    args = argparse.Namespace(models=["bad", "good"], out=str(tmp_path))
    with pytest.raises(SystemExit, match="error: no rows of bad$"):
        in_turn(_rows, args)
    assert {path.name for path in tmp_path.iterdir()} == {"bad", "good"}
