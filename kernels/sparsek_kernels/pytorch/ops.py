"""The call as one custom op, for torch.compile and torch.export.

What a query sees depends on data, so its tensors have sizes that no graph knows. As one node the
call has outputs of known shapes; its backward pass computes the forward pass again.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from sparsek_kernels.state import SlotLayout


def _run(
    q, k, v, scores, slopes, sink_logits, stand_ins, cu_seqlens,
    topk, window, sinks, gate, scale, softcap,
) -> Tensor:  # fmt: skip
    from sparsek_kernels.pytorch.run import run_eagerly

    out, _ = run_eagerly(
        q, k, v, scores, layout=SlotLayout(tuple(topk), window, sinks), slopes=slopes, gate=gate,
        cu_seqlens=cu_seqlens, state=None, scale=scale, softcap=softcap, sink_logits=sink_logits,
        stand_ins=stand_ins,
    )  # fmt: skip
    return out


@torch.library.custom_op("sparsek::attention_pytorch", mutates_args=())
def attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scores: Tensor,
    slopes: Tensor | None,
    sink_logits: Tensor | None,
    stand_ins: Tensor | None,
    cu_seqlens: Tensor | None,
    topk: Sequence[int],
    window: int,
    sinks: int,
    gate: str,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """out [B, H, N, D] for q [B, H, N, D], k and v [B, G, N, D], scores [B, G, N]; no state.

    Args:
        slopes: [G] or None. sink_logits: [H] or None. stand_ins: [H, M, 2 D + 2] or None.
        cu_seqlens: int [docs + 1] or None.
        topk: one budget per KV head. softcap: of the logits, or None.
    """
    with torch.no_grad():
        tensors = q, k, v, scores, slopes, sink_logits, stand_ins, cu_seqlens
        out = _run(*tensors, topk, window, sinks, gate, scale, softcap)
        return out.clone()


@attention_op.register_fake
def _(q, *_):
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _recording() -> AbstractContextManager[None]:
    """Autograd records: inside of a custom op its dispatch keys are excluded, whatever the mode."""
    included = torch._C._dispatch_tls_local_include_set()
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    return torch._C._ForceDispatchKeyGuard(included, excluded)


@torch.library.custom_op("sparsek::attention_pytorch_backward", mutates_args=())
def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scores: Tensor,
    slopes: Tensor | None,
    sink_logits: Tensor | None,
    stand_ins: Tensor | None,
    cu_seqlens: Tensor | None,
    topk: Sequence[int],
    window: int,
    sinks: int,
    gate: str,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, scores, slopes, sink_logits and stand_ins, of their shapes.

    Empty where there is no such tensor.
    """
    given = [x.detach().requires_grad_() for x in (q, k, v, scores)]
    extra = slopes, sink_logits, stand_ins
    extra = [None if x is None else x.detach().requires_grad_() for x in extra]
    with torch.enable_grad(), _recording():
        out = _run(*given, *extra, cu_seqlens, topk, window, sinks, gate, scale, softcap)
        wanted = [*given, *(x for x in extra if x is not None)]
        found = torch.autograd.grad(out, wanted, grad, allow_unused=True, materialize_grads=True)
    found = [x.contiguous().clone() for x in found]
    rest = iter(found[4:])
    return (*found[:4], *(scores.new_empty(0) if x is None else next(rest) for x in extra))


@attention_backward.register_fake
def _(grad, q, k, v, scores, slopes, sink_logits, stand_ins, *_):
    def like(x):
        if x is None:
            return scores.new_empty(0)
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    return tuple(like(x) for x in (q, k, v, scores, slopes, sink_logits, stand_ins))


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.settings = inputs[8:]


def _backward(ctx, grad):
    found = attention_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.settings)
    extra = [
        None if x is None else g for x, g in zip(ctx.saved_tensors[4:7], found[4:], strict=True)
    ]
    return (*found[:4], *extra, *(None,) * (1 + len(ctx.settings)))


attention_op.register_autograd(_backward, setup_context=_save)
