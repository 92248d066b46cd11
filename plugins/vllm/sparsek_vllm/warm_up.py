"""A layer's kernels are compiled before the first request, which else waits seconds for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch
from sparsek_kernels import SparseKState
from sparsek_kernels.state import SlotLayout

# Tokens of the prompts of a step. Triton compiles once more for one prompt, and for numbers that
# 16 divides; beyond 1,024 tokens keys are listed in another way.
READS = ((2048,), (1501, 539), (1000, 800, 248), (333,), (300, 33), (8, 8))
DECODES = (1, 5)  # rows: a launch, or two
_done: set[tuple] = set()


def is_due(layout: SlotLayout, query: torch.Tensor) -> bool:
    """Whether nobody has compiled for such a layer yet; says so once. Not within a graph."""
    if not query.is_cuda or torch.cuda.is_current_stream_capturing():
        return False
    key = layout, query.shape[1:], query.dtype, query.device
    if key in _done:
        return False
    _done.add(key)
    return True


def steps(device: torch.device) -> Iterator[tuple[int, SimpleNamespace]]:
    """Tokens and metadata of steps that read, read on and decode, over rows 1 and up of a pool."""
    rows = max(*DECODES, *(len(lengths) for lengths in READS))
    blocks = torch.arange(1, rows + 1, dtype=torch.int32, device=device)
    for lengths in READS:
        bounds = torch.tensor([0, *lengths], device=device).cumsum(0).int()
        count = len(lengths)
        for has_seen in (False, True):
            yield (
                sum(lengths),
                SimpleNamespace(
                    num_decodes=0,
                    num_prefills=count,
                    num_prefill_tokens=sum(lengths),
                    query_start_loc_p=bounds,
                    state_indices_tensor_p=blocks[:count],
                    has_initial_states_p=torch.full((count,), has_seen, device=device),
                ),
            )
    for count in DECODES:
        yield (
            count,
            SimpleNamespace(
                num_decodes=count, num_prefills=0, state_indices_tensor_d=blocks[:count, None]
            ),
        )


def warm_up(
    attend: Callable[..., None],
    layout: SlotLayout,
    held_in: torch.dtype,
    head_dim: int,
    like: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """Takes a layer through `steps` over states of its own.

    Args:
        attend: query, key, value, hidden states, output, metadata and pool of a step.
        held_in: dtype of the states. like: query, key, value and hidden states of any step.
    """
    query, device = like[0], like[0].device
    pool = SparseKState.empty(
        1 + max(*DECODES, *(len(lengths) for lengths in READS)),
        layout.heads, head_dim, topk=layout.topk, window=layout.window, sinks=layout.sinks,
        dtype=held_in, device=device,
    )  # fmt: skip
    new = torch.Generator(device).manual_seed(0)
    for tokens, metadata in steps(device):
        sizes = ((tokens, x.shape[1]) for x in like)
        tensors = [torch.randn(s, generator=new, dtype=query.dtype, device=device) for s in sizes]
        attend(*tensors, torch.empty_like(tensors[0]), metadata, pool)
