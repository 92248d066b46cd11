"""A server that answers the same again and again holds no more memory than before."""

from __future__ import annotations

import ctypes
import gc

import pytest
from checkpoints import NEW, prompts
from vllm import SamplingParams

ROUNDS = 4
BATCH = prompts(128, longest=90)
# It was 96 bytes; a request's blocks alone are 41 KiB.
NOISE = 64 * 2**10


class MallInfo2(ctypes.Structure):
    """What glibc's malloc says of the process; only its main arena is counted."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost",
        )
    ]  # fmt: skip


def held() -> int:
    """Bytes that were allocated and not freed; what malloc keeps for itself is left out."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        pytest.skip("this C library does not say what is allocated")
    libc.mallinfo2.restype = MallInfo2
    said = libc.mallinfo2()
    return said.uordblks + said.hblkhd


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
