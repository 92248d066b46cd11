"""Launches that begin before the one before them has ended (from sm_90 on).

Such a kernel lets the next one begin, asks for what no launch writes, and waits before it reads
what others do: `gdc_wait` returns when the launch before it has ended and all it wrote is there. As
every kernel of a chain waits, so have all launches before that one.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import triton
import triton.language as tl

_states_rest: ContextVar[bool] = ContextVar("states_rest", default=False)
LINE = tl.constexpr(128)  # bytes that one prefetch brings into the L2 cache


@functools.cache
def may_overlap(device: torch.device) -> bool:
    """Whether launches may begin early there."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def launch_options(overlap: bool) -> dict[str, bool]:
    """Options of a launch that may begin before the one before it ends."""
    return {"launch_pdl": True} if overlap else {}


@contextmanager
def states_at_rest() -> Iterator[None]:
    """Within the block no launch that is still under way changes a state that is stepped.

    The caller promises that between two steps of one state something is launched that waits for all
    before it (whatever torch launches does). Then a step may read its state before it waits.
    """
    token = _states_rest.set(True)
    try:
        yield
    finally:
        _states_rest.reset(token)


def are_states_at_rest() -> bool:
    """Whether the caller promised it, see `states_at_rest`."""
    return _states_rest.get()


@triton.jit
def to_cache(where):
    """Asks the L2 cache for the lines at these addresses: a hint, which reads nothing."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [where], dtype=tl.int32, is_pure=False,
        pack=1,
    )  # fmt: skip
