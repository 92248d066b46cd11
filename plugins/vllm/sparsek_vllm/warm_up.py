"""A layer's kernels are compiled before the first request, which else waits seconds for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace

import torch
from sparsek_kernels import SparseKState
from sparsek_kernels.dispatch import as_if_long
from sparsek_kernels.state import SlotLayout

# Requests that decode, and tokens of prompts. Triton compiles once more for one prompt, and for
# numbers that 16 divides; beyond 1,024 tokens keys are listed in another way, and beyond some
# thousands in a third; up to four rows decode in one launch.
STEPS = (
    (0, (2048,)), (0, (1501, 539)), (0, (1000, 800, 248)), (0, (333,)), (0, (300, 33)), (0, (8, 8)),
    (1, ()), (5, ()), (1, (300, 33)), (5, (333,)),
)  # fmt: skip
BLOCKS = 1 + max(decodes + len(reads) for decodes, reads in STEPS)
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
    """Tokens and metadata of steps that decode, read and read on, over blocks 1 and up."""
    blocks = torch.arange(1, BLOCKS, dtype=torch.int32, device=device)
    for decodes, reads in STEPS:
        bounds = torch.tensor([0, *reads], device=device).cumsum(0).int()
        for has_seen in (False, True) if reads else (True,):
            yield (
                decodes + sum(reads),
                SimpleNamespace(
                    num_decodes=decodes,
                    state_indices_tensor_d=blocks[:decodes, None],
                    num_prefills=len(reads),
                    num_prefill_tokens=sum(reads),
                    query_start_loc_p=bounds,
                    state_indices_tensor_p=blocks[decodes : decodes + len(reads)],
                    has_initial_states_p=torch.full((len(reads),), has_seen, device=device),
                ),
            )


def memory_like(blocks: torch.Tensor) -> torch.Tensor:
    """`BLOCKS` blocks of zeros that lie apart as vLLM's do, as far as a compiler looks at it."""
    stride, size = blocks.stride(0), blocks.shape[1]
    apart = torch.zeros(BLOCKS, size + (stride - size) % 1024, dtype=blocks.dtype)
    return apart.to(blocks.device)[:, :size]


def warm_up(
    attend: Callable[..., None], like: tuple[torch.Tensor, ...], pool: SparseKState
) -> None:
    """Takes a layer through `steps`.

    Args:
        attend: query, key, value, hidden states, output, metadata and pool of a step.
        like: query, key, value and hidden states of any step.
        pool: `BLOCKS` states that nobody else uses.
    """
    query, device = like[0], like[0].device
    new = torch.Generator(device).manual_seed(0)
    for ways in (nullcontext, as_if_long):
        for tokens, metadata in steps(device):
            if ways is as_if_long and not metadata.num_prefills:
                continue
            sizes = ((tokens, x.shape[1]) for x in like)
            tensors = [
                torch.randn(s, generator=new, dtype=query.dtype, device=device) for s in sizes
            ]
            with ways():
                attend(*tensors, torch.empty_like(tensors[0]), metadata, pool)
