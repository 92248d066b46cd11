"""A backend's entry: sparsek_attention with checked arguments; the carried state included."""

import torch

from sparsek_kernels import keys as key_lists
from sparsek_kernels.rows import join_states, pack, row_groups
from sparsek_kernels.scores import effective_scores
from sparsek_kernels.state import EMPTY, SlotLayout, SparseKState, StateRows
from sparsek_kernels.triton import pipeline
from sparsek_kernels.triton.decode import step
from sparsek_kernels.triton.geometry import geometry
from sparsek_kernels.triton.ops import attention
from sparsek_kernels.triton.selection import FOREVER
from sparsek_kernels.triton.state import next_state

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
) -> tuple[torch.Tensor, SparseKState | StateRows | None]:
    """(out, new state); arguments as in sparsek_attention, already checked."""
    batch, _, n, _ = q.shape
    if n == 0:
        return torch.zeros_like(q), state
    if state is None:
        effective = effective_scores(scores, slopes, _positions(slopes, cu_seqlens, n, q.device))
        out, *_ = attention(
            q, k, v, effective, sink_logits, cu_seqlens,
            layout.topk, layout.window, layout.sinks, gate, scale, softcap,
        )  # fmt: skip
        return out, None
    options = dict(layout=layout, slopes=slopes)
    options |= dict(scale=scale, softcap=softcap, sink_logits=sink_logits)
    if cu_seqlens is None:
        return _run_rows(q, k, v, scores, None, state, fresh=fresh, **options)
    groups = row_groups(cu_seqlens, n)
    outputs, states = [], []
    for group in groups:
        rows = [group.gather(x) for x in (q, k, v, scores)]
        part = state.index_select(group.documents)
        out, part = _run_rows(*rows, group.lengths, part, **options)
        outputs.append(out)
        states.append(part)
    out = pack(groups, outputs) if groups else torch.zeros_like(q)
    return out, join_states(state, states, [group.documents for group in groups])


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
def _run_rows(
    q, k, v, scores, lengths, state,
    *, layout: SlotLayout, slopes, scale, softcap, sink_logits, fresh: bool = False,
):  # fmt: skip
    """Rows [B, ..., N] that continue a state; `lengths` [B] or None where all tokens are real."""
    batch, _, n, _ = q.shape
    if n == 1 and lengths is None:
        logits = dict(scale=scale, softcap=softcap, sink_logits=sink_logits)
        return step(q, k, v, scores, slopes, state, **logits), state
    state.support = state.tau = None
    positions = torch.arange(n, device=q.device).expand(batch, n)
    if not fresh:
        positions = positions + state.seen[:, None]
    effective = effective_scores(scores, slopes, positions)
    listed = key_lists.list_new_keys if fresh else key_lists.list_keys
    keys = listed(k, v, effective, positions, layout, state)
    if fresh:
        shape = geometry(q.shape, k.shape, q.device)
        outside = {"always": pipeline.sink_mask(shape, layout.sinks)}
    else:
        total = keys.keys.shape[2]
        # The state's window holds the tokens since max(sinks, seen - window).
        window_start = total - n - (state.seen - layout.sinks).clamp(0, layout.window)
        shape = geometry(q.shape, keys.keys.shape, q.device, window_start=window_start)
        outside = {"always": keys.effective == torch.inf, "never": keys.positions == EMPTY}
    settings = pipeline.Settings(
        layout.topk, layout.window, layout.sinks, "straight_through", scale, softcap
    )
    out, _, end, _ = pipeline.forward(
        q, keys.keys, keys.values, keys.effective, settings, shape,
        sink_logits=sink_logits, **outside,
    )  # fmt: skip
    if not state.quantized:
        return out, next_state(keys, layout, end, lengths, state)
    if lengths is None:
        lengths = torch.full((batch,), n, device=q.device)
    ends = _ends_in_queries(end, keys)
    return out, key_lists.next_state(keys, layout, ends, lengths, state, None)


def _ends_in_queries(end: torch.Tensor, keys: key_lists.KeyList) -> torch.Tensor:
    """`end` counted in queries of this call, where a key never selected ends when it joins."""
    total = end.shape[2]
    joins = torch.arange(total, device=end.device, dtype=torch.int32) - keys.base
    relative = torch.maximum(end - (total - keys.n), joins)
    relative = torch.where(end == FOREVER, keys.n, relative)
    return relative.masked_fill(keys.positions == EMPTY, key_lists.NEVER)
