"""Which kernels run here, and whether they compute what is defined."""

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Iterator
from typing import TYPE_CHECKING

from sparsek_cli.diagnosis.check import REPORT_IT, TOLERANCE, Check

if TYPE_CHECKING:
    import torch


def backend(device: "torch.device", dtype: "torch.dtype") -> Iterator[Check]:
    """Which kernels will run here, and why."""
    name, why = chosen_backend(device, dtype)
    yield Check("backend", None, f"{name} on {device}: {why}")


def chosen_backend(device: "torch.device", dtype: "torch.dtype") -> tuple[str, str]:
    """Name and reason of the backend that sparsek_kernels picks."""
    try:
        dispatch = importlib.import_module("sparsek_kernels.dispatch")
    except ModuleNotFoundError:
        return "pytorch", "the only backend of this installation"
    explain = getattr(dispatch, "explain", None)
    if explain is None:
        return "pytorch", "sparsek_kernels.dispatch gives no reason"
    return explain(device, dtype)


def operator(device: "torch.device") -> Iterator[Check]:
    """The projection's defining properties on random scores: 0 <= p <= 1, sum p = min(k, n)."""
    import torch
    from sparsek_kernels import sparsek

    scores = 2 * torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).to(device)
    worst = 0.0
    for k in (1, 7, 63, 64, 100):
        p = sparsek(scores, k)
        if p.min() < 0 or p.max() > 1 + 1e-5:
            yield Check("operator", False, f"k={k}: a value outside [0, 1] on {device}", REPORT_IT)
            return
        worst = max(worst, float((p.sum(-1) - min(k, 64)).abs().max()))
    yield Check("operator", worst < 1e-3, f"sums right to {worst:.0e} on {device}", REPORT_IT)


def attention(device: "torch.device") -> Iterator[Check]:
    """Attention against PyTorch's own where it must be dense, and chunks against the whole."""
    import torch
    from sparsek_kernels import SparseKState, sparsek_attention

    generator = torch.Generator().manual_seed(0)

    def random(heads: int, *shape: int) -> "torch.Tensor":
        return torch.randn(1, heads, *shape, generator=generator).to(device)

    tokens, size = 96, 32
    q, k, v = random(4, tokens, size), random(2, tokens, size), random(2, tokens, size)
    scores = random(2, tokens)
    dense = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )
    wide = sparsek_attention(q, k, v, scores, topk=tokens, window=8, sinks=2)
    gap = float((wide - dense).abs().max())
    yield Check("attention", gap < TOLERANCE, f"k >= length equals dense to {gap:.0e}", REPORT_IT)

    budget = {"topk": 12, "window": 8, "sinks": 2}
    whole = sparsek_attention(q, k, v, scores, **budget)
    state = SparseKState.empty(1, 2, size, **budget, dtype=q.dtype, device=device)
    pieces, sizes = [], [50, 45, 1]
    for start, length in zip([0, 50, 95], sizes, strict=True):
        part = slice(start, start + length)
        out, state = sparsek_attention(
            q[:, :, part], k[:, :, part], v[:, :, part], scores[:, :, part], **budget, state=state
        )
        pieces.append(out)
    gap = float((torch.cat(pieces, 2) - whole).abs().max())
    yield Check(
        "decode", gap < TOLERANCE, f"chunks and decode equal prefill to {gap:.0e}", REPORT_IT
    )
