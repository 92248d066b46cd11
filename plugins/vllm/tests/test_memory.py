"""A server that answers the same again and again holds no more memory than before."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from checkpoints import NEW, prompts
from vllm import SamplingParams

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from memory import held

ROUNDS = 4
BATCH = prompts(128, longest=90)
# It was 96 bytes; a request's blocks alone are 41 KiB.
NOISE = 64 * 2**10


@pytest.mark.skipif(held() is None, reason="the allocator does not say what is allocated")
def test_requests_that_are_done_leave_no_memory_behind(checkpoint, run_engine):
    """The same ones each time, so that oneDNN compiles for the first round alone."""
    asked = [{"prompt_token_ids": prompt} for prompt in BATCH]
    params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
    after = []
    with run_engine(checkpoint("qwen3")) as llm:
        for _ in range(ROUNDS):
            llm.generate(asked, params, use_tqdm=False)
            after.append(held())
    grown = after[-1] - after[1]
    assert grown < NOISE, f"{grown / len(BATCH) / (ROUNDS - 2):,.0f} bytes for each request"
