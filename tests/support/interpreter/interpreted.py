"""Triton's interpreter for some tests of a process, which the others do not notice.

It must be switched on before a kernel is defined, so it is for all kernels of a process, or none.
But what says so, TRITON_INTERPRET, is what this package asks whether a CPU can run its kernels: it
is there for the tests that are marked `interpret`, and for them alone.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

NAME = "TRITON_INTERPRET"
_on = False


def define_kernels_interpreted() -> None:
    """From now on, where TRITON_INTERPRET is 1; takes it out of the environment."""
    global _on
    if _on or os.environ.get(NAME) != "1":
        return
    from triton import knobs

    before, knobs.propagate_env = knobs.propagate_env, False
    knobs.runtime.interpret = True  # whatever the environment says
    knobs.propagate_env = before
    del os.environ[NAME]
    _on = True


def is_on() -> bool:
    """Whether kernels of this process are interpreted."""
    return _on


@contextmanager
def may_be_run() -> Iterator[None]:
    """Within the block the environment says so, too."""
    os.environ[NAME] = "1"
    _ask_again()
    try:
        yield
    finally:
        del os.environ[NAME]
        _ask_again()


def replace_launches(patch: pytest.MonkeyPatch, run: Callable[..., Any]) -> None:
    """`run(kernel, *args, **options)` instead of every launch; `kernel` is as it is compiled."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    @functools.cache
    def compiled(kernel: InterpretedFunction) -> JITFunction:
        return JITFunction(kernel.fn, **kernel.kwargs)

    def run_compiled(kernel, *args, **options):
        return run(compiled(kernel), *args, **options)

    patch.setattr(JITFunction, "run", run)
    patch.setattr(InterpretedFunction, "run", run_compiled)


def _ask_again() -> None:
    dispatch = sys.modules.get("sparsek_kernels.dispatch")
    if dispatch:
        dispatch._obstacle.cache_clear()
