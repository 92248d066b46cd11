"""The attention call as one node of autograd, and for torch.compile as custom ops.

Called eagerly it is an `autograd.Function`: the checks around a custom op cost as much time on the
CPU as all its launches.
"""

from collections.abc import Sequence

import torch

from sparsek_kernels import scores as twin
from sparsek_kernels.triton import pipeline
from sparsek_kernels.triton.effective import effective_gradients, effective_scores
from sparsek_kernels.triton.geometry import Geometry, geometry
from sparsek_kernels.triton.short.ends import short_ends
from sparsek_kernels.triton.short.limits import has_short_thresholds
from sparsek_kernels.triton.tiles import empty_rows


def _call(
    q, k, cu_seqlens, topk, window, sinks, gate, scale, softcap
) -> tuple[pipeline.Settings, Geometry]:  # fmt: skip
    settings = pipeline.Settings(tuple(topk), window, sinks, gate, scale, softcap)
    return settings, geometry(q.shape, k.shape, q.device, cu_seqlens)


@torch.library.custom_op("sparsek::attention", mutates_args=())
def attention_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scores: torch.Tensor,
    sink_logits: torch.Tensor | None,
    stand_ins: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    topk: Sequence[int],
    window: int,
    sinks: int,
    gate: str,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """out [B, H, N, D]; for the backward pass lse [B, H, N], end [B, G, N] and tau (may be empty).

    Args:
        q [B, H, N, D], k and v [B, G, N, D], scores float64 [B, G, N] (effective scores).
        sink_logits: [H] or None. stand_ins: [H, M, 2 D + 2] or None.
        cu_seqlens: int32 [docs + 1] or None. topk: one budget per KV head.
    """
    call = _call(q, k, cu_seqlens, topk, window, sinks, gate, scale, softcap)
    out, lse, end, tau = pipeline.forward(
        q, k, v, scores, *call, sink_logits=sink_logits, stand_ins=stand_ins
    )
    return out, lse, end, scores.new_empty(0) if tau is None else tau


@attention_op.register_fake
def _(
    q, k, v, scores, sink_logits, stand_ins, cu_seqlens, topk, window, sinks, gate, scale, softcap
):  # fmt: skip
    return (
        empty_rows(q),
        q.new_empty(q.shape[:3], dtype=torch.float32),
        scores.new_empty(scores.shape, dtype=torch.int32),
        scores.new_empty(0 if gate == "straight_through" else scores.shape),
    )


@torch.library.custom_op("sparsek::attention_backward", mutates_args=())
def attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scores: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    end: torch.Tensor,
    tau: torch.Tensor,
    sink_logits: torch.Tensor | None,
    stand_ins: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    topk: Sequence[int],
    window: int,
    sinks: int,
    gate: str,
    scale: float,
    softcap: float | None,
    score_grad: bool,
    deterministic: bool,
) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]:  # fmt: skip
    """dq, dk, dv, d(scores) (empty unless `score_grad`), d(sink_logits), d(stand_ins) (if any)."""
    call = _call(q, k, cu_seqlens, topk, window, sinks, gate, scale, softcap)
    found = pipeline.backward(
        grad, q, k, v, scores, out, lse, end, tau if tau.numel() else None, *call,
        score_grad=score_grad, deterministic=deterministic, sink_logits=sink_logits,
        stand_ins=stand_ins,
    )  # fmt: skip
    return tuple(scores.new_empty(0) if x is None else x for x in found)


@attention_backward.register_fake
def _(
    grad, q, k, v, scores, out, lse, end, tau, sink_logits, stand_ins, cu_seqlens,
    topk, window, sinks, gate, scale, softcap, score_grad, deterministic,
):  # fmt: skip
    return (
        empty_rows(q),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        scores.new_empty(scores.shape if score_grad else 0),
        *(
            scores.new_empty(0) if x is None else torch.empty_like(x)
            for x in (sink_logits, stand_ins)
        ),
    )


def _setup(ctx, inputs, output):
    q, k, v, scores, sink_logits, stand_ins, cu_seqlens, *ctx.settings = inputs
    out, lse, end, tau = output
    ctx.mark_non_differentiable(lse, end, tau)
    ctx.set_materialize_grads(False)  # nobody reads gradients of these
    ctx.save_for_backward(q, k, v, scores, out, lse, end, tau, sink_logits, stand_ins, cu_seqlens)


def _backward(ctx, grad, *_):
    *saved, cu_seqlens = ctx.saved_tensors
    wanted = ctx.needs_input_grad[3]
    dq, dk, dv, de, *own = attention_backward(
        grad, *saved, cu_seqlens, *ctx.settings,
        wanted, torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    own = (None if x is None else found for x, found in zip(saved[-2:], own, strict=True))
    return dq, dk, dv, de if wanted else None, *own, *(None,) * 7


attention_op.register_autograd(_backward, setup_context=_setup)


class _Attention(torch.autograd.Function):
    """Effective scores and attention as one node.

    Without `setup_context`, with which every call binds its arguments by name: a quarter of the
    time that it takes the CPU.
    """

    @staticmethod
    def forward(ctx, q, k, v, scores, slopes, sink_logits, stand_ins, cu_seqlens, *settings):
        settings, shape = _call(q, k, cu_seqlens, *settings)
        given = q, k, v, scores, slopes, sink_logits, stand_ins
        effective, *found = _from_scores(*given, settings, shape)
        ctx.call = settings, shape
        learns = slopes.dtype if ctx.needs_input_grad[4] else None
        ctx.kinds = dict(scores=scores.dtype, slopes=learns, by_token=scores.stride(-1) != 1)
        if settings.gate == "straight_through" and not _learn(ctx):
            kept = None, None, None
        elif has_short_thresholds(shape):  # where a launch counts
            kept = effective, None, None
        else:  # where memory does
            kept = None, scores, slopes
        ctx.save_for_backward(*kept, q, k, v, *found, sink_logits, stand_ins)
        return found[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        effective, scores, slopes, q, k, v, *found, sink_logits, stand_ins = ctx.saved_tensors
        settings, shape = ctx.call
        if scores is not None:
            effective = effective_scores(scores, slopes, shape)
        wanted, d_scores, d_slopes = _learn(ctx), None, None
        dq, dk, dv, de, *own = pipeline.backward(
            grad, q, k, v, effective, *found, settings, shape, score_grad=wanted,
            deterministic=torch.are_deterministic_algorithms_enabled(), sink_logits=sink_logits,
            stand_ins=stand_ins,
        )  # fmt: skip
        if wanted:
            d_scores, d_slopes = effective_gradients(de, effective, shape, **ctx.kinds)
        return dq, dk, dv, d_scores, d_slopes, *own, *(None,) * 7


def _learn(ctx) -> bool:
    """Whether scores or slopes do."""
    return ctx.needs_input_grad[3] or ctx.needs_input_grad[4]


def _from_scores(
    q, k, v, scores, slopes, sink_logits, stand_ins, settings: pipeline.Settings, shape: Geometry
):  # fmt: skip
    """Effective scores, or None where nothing reads them, and what `pipeline.forward` finds.

    Those of a short call are made on the way to its ends. Of sinks they are +inf then, which
    nothing that reads them looks at.
    """
    end = effective = None
    if has_short_thresholds(shape):
        effective = torch.empty(scores.shape, dtype=torch.float64, device=q.device)
        end = short_ends(
            scores, settings.topk, settings.window, shape,
            sinks=settings.sinks, slopes=slopes, effective=effective,
        )  # fmt: skip
    elif settings.gate == "straight_through":
        end = pipeline.find_ends(scores, settings, shape, slopes=slopes)
    else:
        effective = effective_scores(scores, slopes, shape)
    given = q, k, v, effective, settings, shape
    return effective, *pipeline.forward(
        *given, end=end, sink_logits=sink_logits, stand_ins=stand_ins
    )


def attention(
    q, k, v, scores, slopes, sink_logits, stand_ins, cu_seqlens, *settings
) -> torch.Tensor:  # fmt: skip
    """out [B, H, N, D]; arguments as those of `attention_op`, but scores and slopes by themselves.

    A compiler gets the op, and operations that it sees into; else there is one eager node.
    """
    if torch.compiler.is_compiling():
        effective = twin.effective_scores(scores, slopes, _places(q, slopes, cu_seqlens))
        return attention_op(q, k, v, effective, sink_logits, stand_ins, cu_seqlens, *settings)[0]
    given = q, k, v, scores, slopes, sink_logits, stand_ins
    if torch.is_grad_enabled():
        return _Attention.apply(*given, cu_seqlens, *settings)
    return _from_scores(*given, *_call(q, k, cu_seqlens, *settings))[1]


def _places(q, slopes, cu_seqlens) -> torch.Tensor | None:
    """Places [N] of the tokens in their documents, float64, where a slope asks for them."""
    if slopes is None:
        return None
    places = torch.arange(q.shape[2], device=q.device, dtype=torch.float64)
    if cu_seqlens is not None:
        starts = cu_seqlens.to(places.dtype)
        places = places - starts[torch.searchsorted(starts, places, right=True) - 1]
    return places
