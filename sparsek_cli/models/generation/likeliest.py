"""The likeliest token of each row."""

import torch
from sparsek_kernels.dispatch import explain

_TYPES = (torch.bfloat16, torch.float16, torch.float32)


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """argmax of logits [B, V] over V, int64 [B], by our own kernel where Triton runs.

    Both take NaN for the largest, and the first of equals.
    """
    plain = logits.dtype in _TYPES and logits.stride(1) == 1
    if not plain or explain(logits.device, logits.dtype)[0] != "triton":
        return logits.argmax(dim=-1)
    from sparsek_kernels.triton.decode import likeliest as kernels

    return kernels.likeliest(logits)
