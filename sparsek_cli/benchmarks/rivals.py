"""Other attentions under one signature: (data, shape) -> a call that returns the output.

Each raises `Missing` with the reason where it cannot run, so that a table can name it.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import util

import torch
from torch.nn import functional as F

from sparsek_cli.benchmarks.case import Data, Shape

Call = Callable[[], torch.Tensor]
BLOCK = 128


class Missing(Exception):
    """A rival that is not installed or does not run here."""


def sdpa(data: Data, shape: Shape) -> Call:
    """PyTorch's own choice of dense kernel."""
    return lambda: F.scaled_dot_product_attention(
        data.q, data.k, data.v, is_causal=True, enable_gqa=True
    )


def _pinned(backend: str) -> Callable[[Data, Shape], Call]:
    def build(data: Data, shape: Shape) -> Call:
        if shape.device.type != "cuda":
            raise Missing("needs a CUDA device")
        from torch.nn.attention import SDPBackend, sdpa_kernel

        kernel = getattr(SDPBackend, backend)

        def call() -> torch.Tensor:
            with sdpa_kernel(kernel):
                return F.scaled_dot_product_attention(
                    data.q, data.k, data.v, is_causal=True, enable_gqa=True
                )

        try:
            call()
        except RuntimeError as error:
            raise Missing(str(error).splitlines()[0]) from error
        return call

    return build


def flex(data: Data, shape: Shape) -> Call:
    """FlexAttention on blocks: as many keys per query, random blocks, no selection in the time."""
    if shape.device.type != "cuda":
        raise Missing("needs a CUDA device")
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    length = data.q.shape[2]
    if length % BLOCK or shape.topk % BLOCK or shape.window % BLOCK:
        raise Missing(f"length, topk and window must be multiples of {BLOCK}")
    blocks, near, far = length // BLOCK, shape.window // BLOCK, shape.topk // BLOCK
    generator = torch.Generator().manual_seed(shape.seed)
    full = torch.zeros(1, 1, blocks, blocks, dtype=torch.int32)
    counts = torch.zeros(1, 1, blocks, dtype=torch.int32)
    for row in range(blocks):
        old = max(0, row - near)
        chosen = torch.randperm(old, generator=generator)[:far].sort().values
        chosen = torch.cat([chosen, torch.arange(max(0, row - near + 1), row)])
        full[0, 0, row, : len(chosen)] = chosen.int()
        counts[0, 0, row] = len(chosen)
    # The diagonal block and the one that leaves the window are half visible.
    part = torch.zeros(1, 1, blocks, blocks, dtype=torch.int32)
    rows = torch.arange(blocks, dtype=torch.int32)
    part[0, 0, :, 0] = rows
    part[0, 0, near:, 1] = rows[: max(0, blocks - near)]
    part_counts = (1 + (rows >= near).int())[None, None]
    window = shape.window

    def visible(b, h, q, k):
        return (q >= k) & (q - k < window)

    mask = BlockMask.from_kv_blocks(
        part_counts.cuda(), part.cuda(), counts.cuda(), full.cuda(),
        BLOCK_SIZE=BLOCK, mask_mod=visible,
    )  # fmt: skip
    # For this length alone: Dynamo gives up after eight compilations of one function.
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(data.q, data.k, data.v, block_mask=mask, enable_gqa=True)


def fla_nsa(data: Data, shape: Shape) -> Call:
    """Native sparse attention of flash-linear-attention, its own selection included."""
    if util.find_spec("fla") is None:
        raise Missing("the package flash-linear-attention is not installed")
    if shape.device.type != "cuda":
        raise Missing("needs a CUDA device")
    from fla.ops.nsa import parallel_nsa

    q, k, v = (x.transpose(1, 2).contiguous() for x in (data.q, data.k, data.v))
    gates = torch.ones(*q.shape[:3], device=q.device, dtype=q.dtype)
    size = 64
    return lambda: parallel_nsa(
        q, k, v, gates, gates, gates,
        block_counts=shape.topk // size, block_size=size, window_size=shape.window,
    ).transpose(1, 2)  # fmt: skip


RIVALS: dict[str, Callable[[Data, Shape], Call]] = {
    "sdpa": sdpa,
    "sdpa-flash": _pinned("FLASH_ATTENTION"),
    "sdpa-cudnn": _pinned("CUDNN_ATTENTION"),
    "flex": flex,
    "fla-nsa": fla_nsa,
}
DENSE = ("sdpa", "sdpa-flash", "sdpa-cudnn")


def default_rivals(device: torch.device) -> list[str]:
    return ["sdpa-flash", "sdpa-cudnn", "flex", "fla-nsa"] if device.type == "cuda" else ["sdpa"]
