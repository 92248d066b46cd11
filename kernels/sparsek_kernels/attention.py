"""sparsek_attention: the one function that models call."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sparsek_kernels import dispatch
from sparsek_kernels.state import SlotLayout, SparseKState, StateRows, topk_per_head

GATES = ("straight_through", "log", "kv")


def sparsek_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scores: Tensor,
    *,
    topk: int | Sequence[int],
    window: int,
    sinks: int = 0,
    slopes: Tensor | None = None,
    gate: str = "straight_through",
    cu_seqlens: Tensor | None = None,
    state: SparseKState | StateRows | None = None,
    fresh: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    stand_ins: Tensor | None = None,
    backend: str | None = None,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, SparseKState | StateRows]:
    """Causal attention to sinks, a window and the k best-scored earlier keys (arXiv 2406.16747).

    Query t sees, in one softmax: the first `sinks` tokens, the `window` latest ones (itself
    included) and, of the candidates s <= j <= t - w, the `topk` best by (u_j + slope * j, then
    the earlier token). Time O(N (k + w)), memory O(N). topk >= N is dense causal attention.

    Differentiable once in q, k, v, scores, slopes, sink_logits and stand_ins. Keys carried in by
    `state` are constants; under `straight_through` a state that has seen tokens keeps no tau, so
    scores and slopes then get no gradient.

    Args:
        q: [B, H, N, D], fp64, fp32, bf16 or fp16. Computed in fp32, or fp64 for fp64.
        k, v: [B, G, N, D] with H a multiple of G, q's dtype.
        scores: [B, G, N] u_j, any floating dtype, compared in float64. A key whose u_j + slope * j
            is -inf or NaN is never selected (it is seen in its window, as a sink, and by `sdpa`);
            +inf is the largest number. Gates `log` and `kv` and the gradient of scores can use none
            above 1e9: `pytorch` refuses them; Triton, which would have to wait for the GPU to look,
            does not, and what it puts out is then undefined.
        topk: k >= 0, or one per KV head. 0 leaves window and sinks.
        window: w >= 1.
        sinks: s >= 0.
        slopes: [G] or None, added as slope * position.
        gate: `straight_through` (plain softmax; gates only in the gradient), `log` (log m added
            to the logits) or `kv` (the paper's: m scales key and value rows).
        cu_seqlens: [docs + 1] bounds of documents packed along N (B must be 1); prefixes, sinks
            and windows restart at each. With a state, one row of the state per document, and
            empty documents are allowed; on a GPU the bounds are then believed, not looked at.
        state: what earlier calls kept, in q's dtype or in 8 bits (queries of this call see each
            other's keys as they are, and earlier ones as they were kept). It is consumed: use the
            returned one, clone() to keep it. Rows of a pool (`StateRows`) change in place, and
            come back as they are.
        fresh: the caller knows that `state` has seen nothing: it is filled, whatever it holds
            (`SparseKState.empty(filled=False)`). Of rows of a pool each says so for itself.
        scale: default 1 / sqrt(D).
        softcap: each logit x = scale * q.k becomes softcap * tanh(x / softcap), as in Gemma 2,
            before gates act on it. None: as it is.
        sink_logits: [H], any floating dtype: one further logit per query head in the softmax,
            which has no value, as in gpt-oss: attention to nothing. None: there is none.
        stand_ins: [H, M, 2 D + 2], any floating dtype: key, value, bias and limit (which gets no
            gradient) of M pairs per query head that stand in for evicted ones. Query t of its text
            misses n = t + 1 - (s + k + w); where n > 0, each is one more pair in the softmax, its
            logit scale * q.key + bias + min(log n, limit), without softcap, gate or slot.
        backend: `pytorch`, `triton`, `sdpa`, or None to choose (see dispatch.py).
        out: [B, H, N, D] in q's dtype, its last dimension dense: where the answer is written, which
            is then what is returned. None: memory of its own. Not with a gradient.

    Returns:
        [B, H, N, D] in q's dtype; with a state, (that, the new state).

    Raises:
        ValueError, TypeError: the arguments do not fit together; nothing was computed. Or scores
            are too large for their gate, see there.
    """
    layout = _check(q, k, v, scores, topk, window, sinks, slopes, gate, cu_seqlens, state)
    _check_logits(q, softcap, sink_logits, stand_ins)
    wanted = (q, k, v, scores, slopes, sink_logits, stand_ins)
    gradient = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in wanted)
    if isinstance(state, StateRows):
        _check_rows(state, q, gate, cu_seqlens, gradient)
    if out is not None:
        _check_out(out, q, gradient)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    run = dispatch.backend(
        backend, q, layout=layout, gate=gate, cu_seqlens=cu_seqlens, state=state,
        plain=softcap is None and sink_logits is None, gradient=gradient,
    )  # fmt: skip
    more = {"fresh": True} if fresh and isinstance(state, SparseKState) else {}
    if out is not None and state is not None:
        more["out"] = out
    if stand_ins is not None:
        more["stand_ins"] = stand_ins
    found, new = run(
        q, k, v, scores,
        layout=layout, slopes=slopes, gate=gate, cu_seqlens=cu_seqlens, state=state, scale=scale,
        softcap=softcap, sink_logits=sink_logits, **more,
    )  # fmt: skip
    if out is not None and found is not out:
        found = out.copy_(found)
    return found if state is None else (found, new)


def attend_to_state(
    q: Tensor,
    state: SparseKState,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    stand_ins: Tensor | None = None,
) -> Tensor:
    """What one query per row sees of a state that holds its own token already: nothing is put in.

    For layers that share keys: the first of them inserts a token and attends in one call of
    `sparsek_attention`, and those after it attend to the state that it left. Gate
    `straight_through`; not differentiable in the state.

    Args:
        q: [B, H, 1, D], H a multiple of the state's KV heads.
        state: as `sparsek_attention` left it. scale, softcap, sink_logits, stand_ins: as there.

    Returns:
        [B, H, 1, D] in q's dtype.

    Raises:
        ValueError, TypeError: the query does not fit the state, or another argument the query.
    """
    from sparsek_kernels.pytorch.decode import decode

    rows, heads = state.batch, state.layout.heads
    if q.dim() != 4 or q.shape[0] != rows or q.shape[2] != 1 or q.shape[1] % heads:
        raise ValueError(
            f"q must be [{rows}, a multiple of {heads}, 1, D] for this state, got {tuple(q.shape)}"
        )
    if q.shape[3] != state.keys.shape[-1]:
        raise ValueError(f"the state's head size is {state.keys.shape[-1]}, q's {q.shape[3]}")
    _check_logits(q, softcap, sink_logits, stand_ins)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    return decode(
        q, state, scale=scale, softcap=softcap, sink_logits=sink_logits, stand_ins=stand_ins
    )


def _check(q, k, v, scores, topk, window, sinks, slopes, gate, cu_seqlens, state) -> SlotLayout:
    for name, x, dims in (("q", q, 4), ("k", k, 4), ("v", v, 4), ("scores", scores, 3)):
        if not torch.is_tensor(x) or not x.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor")
        if x.dim() != dims:
            raise ValueError(f"{name} must have {dims} dimensions, got shape {tuple(x.shape)}")
    batch, heads, n, dim = q.shape
    groups = k.shape[1]
    if k.shape != (batch, groups, n, dim) or v.shape != k.shape:
        raise ValueError(
            f"k and v must be [B, G, N, D] like q {tuple(q.shape)}, "
            f"got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if scores.shape != (batch, groups, n):
        raise ValueError(f"scores must be {(batch, groups, n)}, got {tuple(scores.shape)}")
    if groups == 0 or heads % groups:
        raise ValueError(f"{heads} query heads cannot share {groups} KV heads")
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise TypeError(f"q, k and v must share a dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    for name, value, least in (("window", window, 1), ("sinks", sinks, 0)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if slopes is not None and slopes.shape != (groups,):
        raise ValueError(f"slopes must be [{groups}], got {tuple(slopes.shape)}")
    if gate not in GATES:
        raise ValueError(f"gate must be one of {', '.join(GATES)}, got {gate!r}")
    layout = SlotLayout(topk_per_head(topk, groups), window, sinks)
    if cu_seqlens is not None and batch != 1:
        raise ValueError(f"cu_seqlens packs documents into one row, got batch {batch}")
    if state is not None:
        rows = batch if cu_seqlens is None else cu_seqlens.numel() - 1
        if state.batch != rows:
            raise ValueError(f"the state has {state.batch} rows, the call has {rows}")
        if state.layout != layout:
            raise ValueError(f"the state was made for {state.layout}, the call asks {layout}")
        if state.keys.shape[-1] != dim or (not state.quantized and state.keys.dtype != q.dtype):
            raise ValueError("the state's head size or dtype is not that of q, k and v")
    return layout


def _check_logits(
    q: Tensor, softcap: float | None, sink_logits: Tensor | None, stand_ins: Tensor | None
) -> None:
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"softcap must be positive, got {softcap!r}")
    _check_stand_ins(q, stand_ins)
    if sink_logits is None:
        return
    if not torch.is_tensor(sink_logits) or not sink_logits.is_floating_point():
        raise TypeError("sink_logits must be a floating-point tensor")
    if sink_logits.shape != (q.shape[1],):
        raise ValueError(f"sink_logits must be [{q.shape[1]}], got {tuple(sink_logits.shape)}")


def _check_stand_ins(q: Tensor, stand_ins: Tensor | None) -> None:
    if stand_ins is None:
        return
    if not torch.is_tensor(stand_ins) or not stand_ins.is_floating_point():
        raise TypeError("stand_ins must be a floating-point tensor")
    heads, width = q.shape[1], 2 * q.shape[3] + 2
    fits = stand_ins.dim() == 3 and stand_ins.shape[::2] == (heads, width)
    if not fits or stand_ins.shape[1] < 1:
        raise ValueError(
            f"stand_ins must be [{heads}, M, {width}] with M >= 1: key, value, bias and "
            f"limit of M pairs per query head, got {tuple(stand_ins.shape)}"
        )


def _check_out(out: Tensor, q: Tensor, gradient: bool) -> None:
    if out.shape != q.shape or out.dtype != q.dtype or out.device != q.device:
        raise ValueError(
            f"out must be as q, {tuple(q.shape)} of {q.dtype} on {q.device}, "
            f"got {tuple(out.shape)} of {out.dtype} on {out.device}"
        )
    if out.stride(-1) != 1:
        raise ValueError("out's last dimension must be dense")
    if gradient:
        raise ValueError("out has no gradient: call under torch.no_grad()")


def _check_rows(
    state: StateRows, q: Tensor, gate: str, cu_seqlens: Tensor | None, gradient: bool
) -> None:
    if gate != "straight_through":
        raise ValueError(f"gate {gate!r} keeps a support of no fixed size: no pool has room for it")
    if gradient:
        raise ValueError("rows of a pool change in place: call under torch.no_grad()")
    if state.fresh is not None and q.shape[2] == 1 and cu_seqlens is None:
        raise ValueError("fresh rows are read as a prompt: pass cu_seqlens")
