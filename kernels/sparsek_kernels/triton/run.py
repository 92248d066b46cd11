"""A backend's entry: sparsek_attention with checked arguments; the carried state included."""

import torch

from sparsek_kernels.scores import effective_scores
from sparsek_kernels.state import SlotLayout, SparseKState, StateRows
from sparsek_kernels.triton import pipeline
from sparsek_kernels.triton.decode.step import step
from sparsek_kernels.triton.documents.listing import list_documents
from sparsek_kernels.triton.ops import attention
from sparsek_kernels.triton.state import list_rows, next_state, slot_places

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
    fresh: bool = False,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, SparseKState | StateRows | None]:
    """(out, new state); arguments as in sparsek_attention, already checked.

    `out` is written to where the kernels can; else another tensor comes back.
    """
    n = q.shape[2]
    if n == 0:
        return torch.zeros_like(q), state
    if state is None:
        effective = effective_scores(scores, slopes, _positions(slopes, cu_seqlens, n, q.device))
        out, *_ = attention(
            q, k, v, effective, sink_logits, cu_seqlens,
            layout.topk, layout.window, layout.sinks, gate, scale, softcap,
        )  # fmt: skip
        return out, None
    pooled = isinstance(state, StateRows)
    if cu_seqlens is None and n == 1:
        logits = dict(scale=scale, softcap=softcap, sink_logits=sink_logits)
        return step(q, k, v, scores, slopes, state, out=out, **logits), state

    def read(own: SparseKState | StateRows):
        return _read(
            q, k, v, scores, cu_seqlens, own, layout=layout, slopes=slopes, scale=scale,
            softcap=softcap, sink_logits=sink_logits, fresh=fresh, out=out,
        )  # fmt: skip

    # Rows of a pool are read in place as documents, as batch items by way of a copy.
    return state.through(read) if pooled and cu_seqlens is None else read(state)


def _positions(slopes, cu_seqlens, n: int, device: torch.device) -> torch.Tensor | None:
    """Places [N] of the tokens in their documents, where somebody asks for them."""
    if slopes is None:
        return None
    positions = torch.arange(n, device=device)
    if cu_seqlens is not None:
        starts = cu_seqlens.to(positions.dtype)
        positions = positions - starts[torch.searchsorted(starts, positions, right=True) - 1]
    return positions


@torch.no_grad()
def _read(
    q, k, v, scores, cu_seqlens, state,
    *, layout: SlotLayout, slopes, scale, softcap, sink_logits, fresh: bool, out=None,
):  # fmt: skip
    """Several tokens of each row of a state: batch items, or documents packed in one row."""
    pool = state.pool if isinstance(state, StateRows) else state
    pool.support = pool.tau = None
    if cu_seqlens is not None:
        starts, _ = slot_places(layout, q.device)
        keys, shape = list_documents(q, k, v, scores, slopes, cu_seqlens, layout, state, starts)
    else:
        keys, shape = list_rows(q, k, v, scores, slopes, layout, state, fresh=fresh)
    settings = pipeline.Settings(
        layout.topk, layout.window, layout.sinks, "straight_through", scale, softcap
    )
    listed = not fresh or cu_seqlens is not None
    out, _, end, _ = pipeline.forward(
        q, keys.keys, keys.values, keys.effective, settings, shape,
        positions=keys.positions if listed else None, sink_logits=sink_logits, out=out,
    )  # fmt: skip
    return out, next_state(keys, layout, end, shape, state)
