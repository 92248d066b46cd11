"""The whole call: documents become rows, keys are listed and selected, tiles attend."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsek_kernels import keys as key_lists
from sparsek_kernels.pytorch import selection, thresholds
from sparsek_kernels.pytorch.attention import attend, compute_dtype
from sparsek_kernels.pytorch.decode import decode, insert
from sparsek_kernels.pytorch.ops import attention_op
from sparsek_kernels.pytorch.stand_ins import log_missing
from sparsek_kernels.rows import join_states, pack, row_groups
from sparsek_kernels.scores import effective_scores
from sparsek_kernels.state import SlotLayout, SparseKState, StateRows


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scores: Tensor,
    *,
    layout: SlotLayout,
    slopes: Tensor | None,
    gate: str,
    cu_seqlens: Tensor | None,
    state: SparseKState | StateRows | None,
    scale: float,
    softcap: float | None,
    sink_logits: Tensor | None,
    stand_ins: Tensor | None = None,
    fresh: bool = False,
    out: Tensor | None = None,
) -> tuple[Tensor, SparseKState | StateRows | None]:
    """A backend's entry: sparsek_attention with checked arguments; returns (out, new state).

    A `fresh` state is made empty, and then looked at as any other. Nothing is written to `out`.
    """
    if fresh:
        state.forget()
    if isinstance(state, StateRows) and (q.shape[2] != 1 or cu_seqlens is not None):
        return state.through(
            lambda own: run(
                q, k, v, scores,
                layout=layout, slopes=slopes, gate=gate, cu_seqlens=cu_seqlens, state=own,
                scale=scale, softcap=softcap, sink_logits=sink_logits, stand_ins=stand_ins,
            )
        )  # fmt: skip
    if state is None and torch.compiler.is_compiling():
        tensors = q, k, v, scores, slopes, sink_logits, stand_ins, cu_seqlens
        settings = layout.topk, layout.window, layout.sinks, gate, scale, softcap
        return attention_op(*tensors, *settings), None
    return run_eagerly(
        q, k, v, scores,
        layout=layout, slopes=slopes, gate=gate, cu_seqlens=cu_seqlens, state=state, scale=scale,
        softcap=softcap, sink_logits=sink_logits, stand_ins=stand_ins,
    )  # fmt: skip


def run_eagerly(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scores: Tensor,
    *,
    layout: SlotLayout,
    slopes: Tensor | None,
    gate: str,
    cu_seqlens: Tensor | None,
    state: SparseKState | StateRows | None,
    scale: float,
    softcap: float | None,
    sink_logits: Tensor | None,
    stand_ins: Tensor | None = None,
) -> tuple[Tensor, SparseKState | StateRows | None]:
    """`run`, step by step."""
    options = dict(layout=layout, slopes=slopes, gate=gate)
    options |= dict(scale=scale, softcap=softcap, sink_logits=sink_logits, stand_ins=stand_ins)
    if cu_seqlens is None:
        return _run_rows(q, k, v, scores, None, state, **options)
    groups = row_groups(cu_seqlens, q.shape[2])
    outputs, states = [], []
    for group in groups:
        part = None if state is None else state.index_select(group.documents)
        rows = [group.gather(x) for x in (q, k, v, scores)]
        out, part = _run_rows(*rows, group.lengths, part, **options)
        outputs.append(out)
        states.append(part)
    out = pack(groups, outputs) if groups else torch.zeros_like(q)
    if state is None:
        return out, None
    return out, join_states(state, states, [group.documents for group in groups])


def _run_rows(
    q, k, v, scores, lengths, state, *, layout: SlotLayout, slopes, gate, scale, softcap,
    sink_logits, stand_ins,
):  # fmt: skip
    """One call on rows [B, ..., N]; `lengths` [B] int64 or None where all N tokens are real."""
    batch, _, n, _ = q.shape
    with torch.no_grad():
        if state is not None and n == 1:
            positions = state.seen[:, None]
        else:
            positions = torch.arange(n, device=q.device).expand(batch, -1)
            if state is not None:
                positions = positions + state.seen[:, None]
    effective = effective_scores(scores, slopes, positions)
    grad = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, k, v, effective, sink_logits, stand_ins)
    )
    if n == 0:
        return torch.zeros_like(q), state
    if state is not None and n == 1 and lengths is None and not grad and gate == "straight_through":
        insert(state, k[:, :, 0], v[:, :, 0], effective[:, :, 0])
        logits = dict(softcap=softcap, sink_logits=sink_logits, stand_ins=stand_ins)
        return decode(q, state, scale=scale, **logits), state

    keys = key_lists.list_keys(k, v, effective, positions, layout, state)
    soft = _needs_tau(gate, effective, state)
    with torch.no_grad():
        end = selection.select(keys, layout)
        tau = counts = None
        if soft:
            tau, counts = thresholds.query_thresholds(keys, layout, state)
        missing = None
        if stand_ins is not None:
            missing = log_missing(positions, layout, compute_dtype(q.dtype))
    out = attend(
        q, keys.keys, keys.values, keys.effective, end,
        base=keys.base, window=layout.window, gate=gate, scale=scale, tau=tau, counts=counts,
        softcap=softcap, sink_logits=sink_logits, stand_ins=stand_ins, missing=missing,
    )  # fmt: skip
    if state is None:
        return out, None
    with torch.no_grad():
        if lengths is None:
            lengths = torch.full((batch,), n, device=q.device)
        kept = tau if gate != "straight_through" else None
        return out, key_lists.next_state(keys, layout, end, lengths, state, kept)


def _needs_tau(gate: str, effective: Tensor, state: SparseKState | None) -> bool:
    if gate == "straight_through" and not (torch.is_grad_enabled() and effective.requires_grad):
        return False
    carried = state is not None and bool(state.seen.any())
    if gate == "straight_through":
        return not carried
    if carried and state.support is None:
        raise ValueError(
            f"gate {gate!r} needs the thresholds of the tokens already seen, "
            "and this state was filled under gate 'straight_through'"
        )
    return True
