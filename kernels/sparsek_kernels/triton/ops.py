"""The attention call as one node of autograd, and for torch.compile as custom ops.

Called eagerly it is an `autograd.Function`: the checks around a custom op cost as much time on the
CPU as all its launches.
"""

from collections.abc import Sequence

import torch

from sparsek_kernels.triton import pipeline
from sparsek_kernels.triton.geometry import geometry
from sparsek_kernels.triton.tiles import empty_rows


def _forward(
    q, k, v, scores, sink_logits, cu_seqlens, topk, window, sinks, gate, scale, softcap
):  # fmt: skip
    settings = pipeline.Settings(tuple(topk), window, sinks, gate, scale, softcap)
    shape = geometry(q.shape, k.shape, q.device, cu_seqlens)
    out, lse, end, tau = pipeline.forward(q, k, v, scores, settings, shape, sink_logits=sink_logits)
    return out, lse, end, scores.new_empty(0) if tau is None else tau


def _gradients(
    grad, q, k, v, scores, out, lse, end, tau, sink_logits, cu_seqlens,
    topk, window, sinks, gate, scale, softcap, score_grad, deterministic,
):  # fmt: skip
    settings = pipeline.Settings(tuple(topk), window, sinks, gate, scale, softcap)
    shape = geometry(q.shape, k.shape, q.device, cu_seqlens)
    dq, dk, dv, de, own = pipeline.backward(
        grad, q, k, v, scores, out, lse, end, tau if tau.numel() else None, settings, shape,
        score_grad=score_grad, deterministic=deterministic, sink_logits=sink_logits,
    )  # fmt: skip
    return dq, dk, dv, *(scores.new_empty(0) if x is None else x for x in (de, own))


@torch.library.custom_op("sparsek::attention", mutates_args=())
def attention_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scores: torch.Tensor,
    sink_logits: torch.Tensor | None,
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
        sink_logits: [H] or None.
        cu_seqlens: int32 [docs + 1] or None. topk: one budget per KV head.
    """
    return _forward(
        q, k, v, scores, sink_logits, cu_seqlens, topk, window, sinks, gate, scale, softcap
    )  # fmt: skip


@attention_op.register_fake
def _(q, k, v, scores, sink_logits, cu_seqlens, topk, window, sinks, gate, scale, softcap):
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
    cu_seqlens: torch.Tensor | None,
    topk: Sequence[int],
    window: int,
    sinks: int,
    gate: str,
    scale: float,
    softcap: float | None,
    score_grad: bool,
    deterministic: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv, d(scores) (empty unless `score_grad`) and d(sink_logits) (perhaps empty)."""
    return _gradients(
        grad, q, k, v, scores, out, lse, end, tau, sink_logits, cu_seqlens,
        topk, window, sinks, gate, scale, softcap, score_grad, deterministic,
    )  # fmt: skip


@attention_backward.register_fake
def _(
    grad, q, k, v, scores, out, lse, end, tau, sink_logits, cu_seqlens,
    topk, window, sinks, gate, scale, softcap, score_grad, deterministic,
):  # fmt: skip
    return (
        empty_rows(q),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        scores.new_empty(scores.shape if score_grad else 0),
        scores.new_empty(0) if sink_logits is None else torch.empty_like(sink_logits),
    )


def _setup(ctx, inputs, output):
    q, k, v, scores, sink_logits, cu_seqlens, *ctx.settings = inputs
    out, lse, end, tau = output
    ctx.mark_non_differentiable(lse, end, tau)
    ctx.set_materialize_grads(False)  # nobody reads gradients of these
    ctx.save_for_backward(q, k, v, scores, out, lse, end, tau, sink_logits, cu_seqlens)


def _backward_by(gradients):
    def backward(ctx, grad, *_):
        q, k, v, scores, out, lse, end, tau, sink_logits, cu_seqlens = ctx.saved_tensors
        wanted = ctx.needs_input_grad[3]
        dq, dk, dv, de, own = gradients(
            grad, q, k, v, scores, out, lse, end, tau, sink_logits, cu_seqlens, *ctx.settings,
            wanted, torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        own = None if sink_logits is None else own
        return dq, dk, dv, de if wanted else None, own, *(None,) * 7

    return backward


attention_op.register_autograd(_backward_by(attention_backward), setup_context=_setup)


class _Attention(torch.autograd.Function):
    # Without `setup_context`, with which every call binds its arguments by name: a quarter of
    # the time that it takes the CPU.
    @staticmethod
    def forward(ctx, *inputs):
        output = _forward(*inputs)
        _setup(ctx, inputs, output)
        return output

    backward = staticmethod(torch.autograd.function.once_differentiable(_backward_by(_gradients)))


def attention(*inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`attention_op` with its arguments: the op itself while compiling, else an eager node."""
    if torch.compiler.is_compiling():
        return attention_op(*inputs)
    return _Attention.apply(*inputs) if torch.is_grad_enabled() else _forward(*inputs)
