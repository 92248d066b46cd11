"""What a request takes of a server's memory: its cache, whose size no length changes."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsek_cli.checkpoint_files.shards import read_shards, stored_dtype
from sparsek_cli.errors import UsageError
from sparsek_cli.serving.engines import VLLM
from sparsek_cli.serving.flags import Flags

if TYPE_CHECKING:
    import torch

DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Cost:
    """A request's cache.

    Attributes:
        request_bytes: on each GPU; None where nobody can say. ranks: GPUs that share the model.
        unknown: why nobody can say, or None.
    """

    request_bytes: int | None
    ranks: int = 1
    unknown: str | None = None

    @property
    def requests_per_gib(self) -> int | None:
        """Requests whose caches one GiB (of each GPU) holds."""
        return None if self.request_bytes is None else 2**30 // self.request_bytes

    def text(self) -> str:
        if self.request_bytes is None:
            return f"bytes for each request not known beforehand; {self.unknown}"
        gpus, each = ("", "") if self.ranks == 1 else (f" on each of {self.ranks} GPUs", " of each")
        return (
            f"{self.request_bytes:,} bytes{gpus} for each request, whatever its length: "
            f"{self.requests_per_gib:,} requests in 1 GiB{each}"
        )


def served_dtype(config: Any, folder: Path, asked: str | None) -> str:
    """The dtype of weights and cache: what was asked for, else the checkpoint's own.

    Servers are always told: left alone, vLLM makes 16-bit weights of float32 ones.

    Args:
        config: a converted model's. folder: where its weights are.
        asked: one of `DTYPES`, or None.

    Raises:
        UsageError: the checkpoint's own is none of `DTYPES`.
    """
    own = str(config.dtype or stored_dtype(read_shards(folder))).removeprefix("torch.")
    name = asked or own
    if name not in DTYPES:
        raise UsageError(f"the checkpoint's dtype is {own}", hint=f"give --dtype {DTYPES[0]}")
    return name


def cost(config: Any, engine: str, dtype: str, flags: Flags) -> Cost:
    """What a request takes on `engine` with these flags.

    Args:
        config: a converted model's.
        dtype: of `DTYPES`, as the server is told.

    Raises:
        UsageError: the cache's dtype is another, or GPUs cannot share the heads.
    """
    import torch

    from sparsek_cli.models import sparsek_cache_bytes

    kept = getattr(torch, dtype)
    if engine != VLLM:
        return Cost(sparsek_cache_bytes(config, kept))
    if flags.cache_dtype not in ("auto", dtype):
        raise UsageError(
            f"a cache in {flags.cache_dtype} beside a model in {dtype}",
            hint="leave --kv-cache-dtype out: keys and values are kept as the model computes them",
        )
    ranks = flags.ranks
    _check_ranks(config, ranks)
    unknown = flags.bytes_left_open()
    if unknown is not None:
        return Cost(None, ranks, unknown)
    return Cost(_block_bytes(config, kept, ranks), ranks)


def _block_bytes(config: Any, dtype: torch.dtype, ranks: int) -> int:
    """The blocks that the plugin has vLLM allocate for one request, on each rank."""
    return importlib.import_module("sparsek_vllm.sizes").request_bytes(config, dtype, ranks)


def _check_ranks(config: Any, ranks: int) -> None:
    from sparsek_cli.models.config import kv_heads

    heads, pairs = config.num_attention_heads, kv_heads(config)
    if heads % ranks or (pairs % ranks and ranks % pairs):
        raise UsageError(
            f"{ranks} GPUs cannot share {heads} heads with {pairs} KV heads",
            hint="give --tensor-parallel-size a number that divides both",
        )
