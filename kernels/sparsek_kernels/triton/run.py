"""A backend's entry: sparsek_attention with checked arguments; the carried state included."""

from functools import lru_cache

import torch

from sparsek_kernels.state import SlotLayout, SparseKState, StateRows
from sparsek_kernels.triton import pipeline
from sparsek_kernels.triton.decode.step import step
from sparsek_kernels.triton.documents.listing import list_documents
from sparsek_kernels.triton.geometry import geometry
from sparsek_kernels.triton.ops import attention
from sparsek_kernels.triton.state import first_slots, list_new, next_state

MAX_HEAD_DIM = 256


def unsupported(
    q: torch.Tensor, *, gate: str, state: SparseKState | None, gradient: bool
) -> str | None:
    """Why this backend cannot take the call, or None."""
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"dtype {q.dtype}"
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"head size {q.shape[-1]} > {MAX_HEAD_DIM}"
    if state is not None and gate != "straight_through":
        return f"gate {gate!r} with a carried state"
    if state is not None and gradient:
        return "a gradient through a carried state"
    return None


def run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scores: torch.Tensor,
    *,
    layout: SlotLayout,
    slopes: torch.Tensor | None,
    gate: str,
    cu_seqlens: torch.Tensor | None,
    state: SparseKState | StateRows | None,
    scale: float,
    softcap: float | None,
    sink_logits: torch.Tensor | None,
    stand_ins: torch.Tensor | None = None,
    fresh: bool = False,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, SparseKState | StateRows | None]:
    """(out, new state); arguments as in sparsek_attention, already checked.

    `out` is written to where the kernels can; else another tensor comes back.
    """
    n = q.shape[2]
    first = fresh and cu_seqlens is None and n > 1
    if fresh and not first:  # what the state holds is looked at below
        state.forget()
    if n == 0:
        return torch.zeros_like(q), state
    if state is None:
        out = attention(
            q, k, v, scores, slopes, sink_logits, stand_ins, cu_seqlens,
            layout.topk, layout.window, layout.sinks, gate, scale, softcap,
        )  # fmt: skip
        return out, None
    if cu_seqlens is None and n == 1:
        logits = dict(scale=scale, softcap=softcap, sink_logits=sink_logits, stand_ins=stand_ins)
        return step(q, k, v, scores, slopes, state, out=out, **logits), state
    settings = pipeline.Settings(
        layout.topk, layout.window, layout.sinks, "straight_through", scale, softcap
    )
    beside = dict(sink_logits=sink_logits, stand_ins=stand_ins)
    if first:
        return _read_first(q, k, v, scores, slopes, state, settings, beside, out), state
    if cu_seqlens is not None:
        given = q, k, v, scores, slopes, state, settings, beside, out, cu_seqlens
        return _read_documents(*given), state
    batch = q.shape[0]
    bounds = _row_bounds(batch, n, q.device)
    if batch == 1:
        given = q, k, v, scores, slopes, state, settings, beside, out, bounds
        return _read_documents(*given), state
    rows = (x.transpose(0, 1).flatten(1, 2)[None] for x in (q, k, v, scores))
    found = _read_documents(*rows, slopes, state, settings, beside, None, bounds)
    return found[0].unflatten(1, (batch, n)).transpose(0, 1), state


@lru_cache(maxsize=64)
def _row_bounds(batch: int, n: int, device: torch.device) -> torch.Tensor:
    """Rows of a batch as documents, one behind the other: int32 [B + 1]."""
    return torch.arange(batch + 1, dtype=torch.int32, device=device) * n


@torch.no_grad()
def _read_first(
    q, k, v, scores, slopes, state: SparseKState, settings: pipeline.Settings, beside: dict, out
) -> torch.Tensor:
    """Several tokens of each row of a state that has seen nothing; `beside`: of the logits."""
    state.support = state.tau = None
    shape = geometry(q.shape, k.shape, q.device)
    keys, end = list_new(k, v, scores, slopes, state.layout, state, shape)
    out, _, end, _ = pipeline.forward(
        q, k, v, keys.effective, settings, shape, end=end, out=out, **beside
    )
    next_state(keys, state.layout, end, shape, state)
    return out


@torch.no_grad()
def _read_documents(
    q, k, v, scores, slopes, state: SparseKState | StateRows, settings: pipeline.Settings,
    beside: dict, out, cu_seqlens,
) -> torch.Tensor:  # fmt: skip
    """Documents packed in one row, each with a row of the state."""
    layout = state.layout
    pool = state.pool if isinstance(state, StateRows) else state
    pool.support = pool.tau = None
    starts = first_slots(layout, q.device)
    keys, shape = list_documents(q, k, v, scores, slopes, cu_seqlens, layout, state, starts)
    out, _, end, _ = pipeline.forward(
        q, keys.keys, keys.values, keys.effective, settings, shape,
        positions=keys.positions, out=out, **beside,
    )  # fmt: skip
    next_state(keys, layout, end, shape, state)
    return out
