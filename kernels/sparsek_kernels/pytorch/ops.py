"""The call as one custom op, for torch.compile and torch.export.

What a query sees depends on data, so its tensors have sizes that no graph knows. As one node the
call has outputs of known shapes; its backward pass computes the forward pass again.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from sparsek_kernels.state import SlotLayout


def _run(q, k, v, scores, slopes, cu_seqlens, topk, window, sinks, gate, scale) -> Tensor:
    from sparsek_kernels.pytorch.run import run_eagerly

    out, _ = run_eagerly(
        q, k, v, scores, layout=SlotLayout(tuple(topk), window, sinks), slopes=slopes, gate=gate,
        cu_seqlens=cu_seqlens, state=None, scale=scale,
    )  # fmt: skip
    return out


@torch.library.custom_op("sparsek::attention_pytorch", mutates_args=())
def attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scores: Tensor,
    slopes: Tensor | None,
    cu_seqlens: Tensor | None,
    topk: Sequence[int],
    window: int,
    sinks: int,
    gate: str,
    scale: float,
) -> Tensor:
    """out [B, H, N, D] for q [B, H, N, D], k and v [B, G, N, D], scores [B, G, N]; no state.

    Args:
        slopes: [G] or None. cu_seqlens: int [docs + 1] or None. topk: one budget per KV head.
    """
    with torch.no_grad():
        return _run(q, k, v, scores, slopes, cu_seqlens, topk, window, sinks, gate, scale).clone()


@attention_op.register_fake
def _(q, k, v, scores, slopes, cu_seqlens, topk, window, sinks, gate, scale):
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
    cu_seqlens: Tensor | None,
    topk: Sequence[int],
    window: int,
    sinks: int,
    gate: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, scores and slopes, each of its tensor's shape (slopes: maybe empty)."""
    given = [x.detach().requires_grad_() for x in (q, k, v, scores)]
    own = None if slopes is None else slopes.detach().requires_grad_()
    with torch.enable_grad(), _recording():
        out = _run(*given, own, cu_seqlens, topk, window, sinks, gate, scale)
        wanted = [*given, *([] if own is None else [own])]
        found = torch.autograd.grad(out, wanted, grad, allow_unused=True, materialize_grads=True)
    found = [x.contiguous().clone() for x in found]
    return (*found[:4], found[4] if own is not None else scores.new_empty(0))


@attention_backward.register_fake
def _(grad, q, k, v, scores, slopes, cu_seqlens, topk, window, sinks, gate, scale):
    like = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, scores)]
    return (*like, scores.new_empty(0) if slopes is None else torch.empty_like(slopes))


def _save(ctx, inputs, output) -> None:
    *tensors, topk, window, sinks, gate, scale = inputs
    ctx.save_for_backward(*tensors)
    ctx.settings = (topk, window, sinks, gate, scale)


def _backward(ctx, grad):
    found = attention_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.settings)
    slopes = None if ctx.saved_tensors[4] is None else found[4]
    return (*found[:4], slopes, None, None, None, None, None, None)


attention_op.register_autograd(_backward, setup_context=_save)
