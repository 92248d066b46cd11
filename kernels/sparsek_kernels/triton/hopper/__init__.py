"""Kernels for compute capability 9.0 in Gluon, for the gate `straight_through` in 16 bits."""

import torch

from sparsek_kernels.triton.hopper.forward import attend_forward
from sparsek_kernels.triton.hopper.key_gradient import key_gradient
from sparsek_kernels.triton.hopper.query_gradient import query_gradient
from sparsek_kernels.triton.hopper.tiles import ROWS, heads_of_tile

__all__ = ["attend_forward", "key_gradient", "query_gradient", "takes", "tile_queries"]


def takes(q: torch.Tensor, gate: str, scale: float, softcap: float | None = None) -> bool:
    """Whether the kernels compute this call (on a device of capability 9.0)."""
    is_half = q.dtype in (torch.bfloat16, torch.float16)
    plain = gate == "straight_through" and softcap is None
    return is_half and q.shape[3] in (64, 128) and plain and scale > 0


def tile_queries(group: int) -> int:
    """Queries of one program; a key list must serve at least as many."""
    return ROWS // heads_of_tile(group)
