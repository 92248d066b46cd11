"""The one place that decides which backend computes a call.

- `triton` on CUDA, if Triton is installed and takes the call;
- `sdpa`, PyTorch's dense kernel, on CUDA where no key can be evicted (N <= s + k + w): SparseK is
  then dense causal attention, so the results are the same and the dense kernel is the faster one
  (scores are not looked at: keys of -inf or NaN are seen, too; stand-ins have nothing to stand
  in for);
- `pytorch` everywhere else.

Each distinct decision is logged once; `describe` says all of it for `sparsek doctor`.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from importlib import resources, util
from typing import Any

import torch

from sparsek_kernels.state import SlotLayout, SparseKState

BACKENDS = ("pytorch", "triton", "sdpa")
MIN_CAPABILITY = (8, 0)
TAKES = "a CUDA device that the kernels support"
_LOG = logging.getLogger("sparsek_kernels")
_logged: set[tuple[str, str]] = set()
_all_long: ContextVar[bool] = ContextVar("all_long", default=False)


def _constant(function: Callable) -> Callable:
    """`torch.compiler.assume_constant_result`, which would import the compiler: seconds."""
    function._dynamo_marked_constant = True
    return function


def backend(
    name: str | None,
    q: torch.Tensor,
    *,
    layout: SlotLayout,
    gate: str,
    cu_seqlens: torch.Tensor | None,
    state: SparseKState | None,
    plain: bool = True,
    gradient: bool = False,
) -> Callable[..., tuple[torch.Tensor, SparseKState | None]]:
    """The `run` function of the backend for this call.

    Args:
        name: one of `BACKENDS` to insist on it, or None to choose.
        plain: logits are neither capped, nor is there a further one in the softmax.
        gradient: one is wanted of any argument.

    Raises:
        ValueError: the backend named does not exist or cannot take the call.
    """
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend must be None or one of {', '.join(BACKENDS)}, got {name!r}")
    chosen, why = (
        (name, "asked") if name else _choose(q, layout, gate, cu_seqlens, state, plain, gradient)
    )
    if name == "triton":
        obstacle = _no_triton(q.device) or _unsupported(q, gate, state, gradient)
        if obstacle:
            raise ValueError(f"backend 'triton' cannot take this call: {obstacle}")
    if name == "sdpa" and not (plain and _is_dense(q, layout, cu_seqlens, state)):
        raise ValueError("backend 'sdpa' needs a call in which no key can be evicted, no state, "
                         "no packed documents, no softcap and no sink_logits")  # fmt: skip
    if not torch.compiler.is_compiling() and (chosen, why) not in _logged:
        _logged.add((chosen, why))
        _LOG.info("attention runs on the %s backend: %s", chosen, why)
    if chosen == "triton":
        from sparsek_kernels import triton as module

        return module.run
    if chosen == "sdpa":
        return _run_dense
    from sparsek_kernels import pytorch as module

    return module.run


def _choose(q, layout, gate, cu_seqlens, state, plain, gradient) -> tuple[str, str]:
    if plain and q.device.type == "cuda" and _is_dense(q, layout, cu_seqlens, state):
        return "sdpa", "no key can be evicted at this length"
    obstacle = _not_by_itself(q.device) or _unsupported(q, gate, state, gradient)
    return ("pytorch", obstacle) if obstacle else ("triton", TAKES)


def _is_dense(q, layout: SlotLayout, cu_seqlens, state) -> bool:
    fits = q.shape[2] <= layout.sinks + min(layout.topk) + layout.window
    return fits and cu_seqlens is None and state is None and q.dtype != torch.float64


@_constant
def _not_by_itself(device: torch.device) -> str | None:
    """Why Triton is not chosen where nobody insists on it, or None."""
    return f"device {device.type}" if device.type != "cuda" else _no_triton(device)


@_constant
def _no_triton(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on the device, or None; a constant to torch.compile."""
    return _obstacle(device)


@lru_cache(maxsize=16)
def _obstacle(device: torch.device) -> str | None:
    if util.find_spec("triton") is None:
        return "Triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda":
        return f"device {device.type}"
    if torch.version.hip:
        return "the kernels are written for NVIDIA devices"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} < 8.0"
    return None


@contextmanager
def as_if_long() -> Iterator[None]:
    """Within the block every call on Triton takes the ways of long ones.

    To compile for them before one comes, and to compare: the results are the same to the bit, but
    for the thresholds of gates and of gradients, which are so to rounding.
    """
    token = _all_long.set(True)
    try:
        yield
    finally:
        _all_long.reset(token)


def are_all_long() -> bool:
    """Whether calls are taken for long ones, see `as_if_long`."""
    return _all_long.get()


def _unsupported(q, gate, state, gradient) -> str | None:
    from sparsek_kernels.triton import unsupported

    return unsupported(q, gate=gate, state=state, gradient=gradient)


def _run_dense(
    q, k, v, scores, *, layout, slopes, gate, cu_seqlens, state, scale, softcap, sink_logits,
    stand_ins=None,
):  # fmt: skip
    """Dense causal attention; every gate is 1, and nothing has to be stood in for.

    So scores, slopes and stand_ins get a zero gradient.
    """
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    if torch.is_grad_enabled():
        for unused in (scores, slopes, stand_ins):
            if unused is not None and unused.requires_grad:
                # Of no element: a score of -inf times 0 were NaN.
                out = out + unused[:0].sum().to(out.dtype)
    return out, None


def explain(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """Backend and reason for a long straight-through call on `device` in `dtype`."""
    obstacle = _not_by_itself(device)
    if obstacle is None and dtype == torch.float64:
        obstacle = f"dtype {dtype}"
    return ("pytorch", obstacle) if obstacle else ("triton", TAKES)


def break_evens() -> list[dict[str, Any]]:
    """Measured lengths from which sparse beats dense, with the device and shape of each."""
    text = resources.files("sparsek_kernels").joinpath("break_even.json").read_text()
    return json.loads(text)["measured"]


def describe() -> dict[str, Any]:
    """What would be chosen here, and why; plain data for `sparsek doctor`."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    name, why = explain(device, torch.bfloat16)
    found = {
        "device": torch.cuda.get_device_name(0) if device.type == "cuda" else "cpu",
        "backend": name,
        "reason": why,
        "triton": _version("triton"),
        "dense_below": "sinks + topk + window tokens (nothing can be evicted: sdpa)",
        "break_even": break_evens(),
    }
    if device.type == "cuda":
        found["compute_capability"] = ".".join(map(str, torch.cuda.get_device_capability(0)))
    return found


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
