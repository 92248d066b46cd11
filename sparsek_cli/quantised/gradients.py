"""Whether gradients go through packed weights, to the scorers and adapters of lower layers."""

from __future__ import annotations

import torch
from torch import nn

from sparsek_cli.errors import UsageError
from sparsek_cli.quantised.methods import described, stays_packed
from sparsek_cli.quantised.weights import weight_of

# Of the largest entry: both sides are rounded to 16 bits, and weights to 8 bits or fewer.
_TOLERANCE = 5e-2


def check_gradients(model: nn.Module) -> None:
    """Raises UsageError where one is lost: training would go on with what comes by other ways.

    Some kernels have no backward pass; that depends on the device and on the package's version, so
    one layer of each kind is tried. Where a package lets us choose, the kernel that has one is
    taken from here on.
    """
    if not stays_packed(model.config):
        return
    _take_kernels_with_backward(model)
    kinds = {type(module): module for module in model.modules() if _is_packed(module)}
    for kind, linear in kinds.items():
        if not (_may_train(linear) and _has_gradient(linear, model.dtype, model.device)):
            raise UsageError(
                f"the model is quantised ({described(model.config)}), and its {kind.__name__} "
                f"hands no gradient on ({model.device.type})",
                hint="use its scorers as calibration found them, or convert and fine-tune the "
                "checkpoint that it was made from",
            )


def _take_kernels_with_backward(model: nn.Module) -> None:
    """bitsandbytes' 4 bits on a CPU with AVX512-BF16.

    Computing once without gradients, as the held-out loss is, lays such weights out anew for a
    kernel that has no backward pass, and they stay so.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _is_packed(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    plain = type(module) is nn.Linear and type(weight) is nn.Parameter
    return hasattr(module, "in_features") and hasattr(module, "out_features") and not plain


def _may_train(linear: nn.Module) -> bool:
    """Whether it takes the mode that training sets; some of GPTQ's kernels refuse only that."""
    was_training = linear.training
    try:
        linear.train()
    except NotImplementedError:
        return False
    linear.train(was_training)
    return True


def _has_gradient(linear: nn.Module, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether d(upstream . linear(x)) / dx is the weight times upstream."""
    generator = torch.Generator().manual_seed(0)
    made = {"dtype": dtype, "device": device}
    x = torch.randn(2, linear.in_features, generator=generator).to(**made).requires_grad_()
    upstream = torch.randn(2, linear.out_features, generator=generator).to(**made)
    with torch.no_grad():
        # As the held-out loss is measured first: some kernels are chosen once, for good.
        linear(x.detach())
    with torch.enable_grad():
        out = linear(x)
        if out.grad_fn is None:
            return False
        (found,) = torch.autograd.grad(out, x, upstream, allow_unused=True)
    if found is None:
        return False
    with torch.no_grad():
        weight = weight_of(linear, linear.in_features, upstream)
    expected = upstream.float() @ weight.T
    return bool((found.float() - expected).abs().max() <= _TOLERANCE * expected.abs().max())
