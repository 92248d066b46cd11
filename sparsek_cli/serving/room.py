"""What vLLM's caches get of a CPU's memory, where nobody said it.

Left alone vLLM wants 92 % of the memory free before it starts, and takes for caches what the model
leaves of that. But a request has blocks of one size, whatever its length, and so many are under way
at most: more is never used.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sparsek_cli import byte_units
from sparsek_cli.checkpoint_files.shards import Shard
from sparsek_cli.errors import UsageError
from sparsek_cli.serving.cost import Cost
from sparsek_cli.serving.flags import Flags

AT_ONCE = 128  # requests that vLLM's server has under way on a CPU, times its ranks
ENVIRONMENT = "VLLM_CPU_KVCACHE_SPACE"
_NULL = 2  # blocks that no request gets: vLLM's own, and what its rounding loses
_SHARE = 0.8  # of what the model leaves free, so that a step has memory, too
_GROUPS = Path("/sys/fs/cgroup")
# A container's limit, what of it is used, and of that what is no more than a copy of files.
_LIMITS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat",
        "total_inactive_file",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Room:
    """Memory of caches.

    Attributes:
        bytes: of each rank. requests: whose caches these are, that many at once.
        free: bytes of memory that are free, where more requests could be under way; else None.
    """

    bytes: int
    requests: int
    free: int | None = None

    @property
    def flags(self) -> tuple[str, str]:
        return "--kv-cache-memory-bytes", str(self.bytes)

    def text(self) -> str:
        held = f"{byte_units.size(self.bytes)} for the caches of {self.requests:,} requests at once"
        if self.free is not None:
            return f"{held}, others wait: {byte_units.size(self.free)} of memory are free"
        return f"{held} ({self.flags[0]} after -- says otherwise)"


def room(cost: Cost, flags: Flags, weights: int, environment: Mapping[str, str]) -> Room | None:
    """Memory for as many requests as are under way at most, or as there is memory for.

    None on a GPU, where nobody knows what a request takes, and where somebody said how much.

    Args:
        weights: bytes of the model as it is served, on all ranks together.

    Raises:
        UsageError: there is none for one request.
    """
    at_once = flags.at_once(AT_ONCE * cost.ranks)
    said = flags.memory_said or environment.get(ENVIRONMENT)
    if said or at_once is None or cost.request_bytes is None or not _on_cpu():
        return None
    wanted = (at_once + _NULL) * cost.request_bytes
    free = free_memory()
    if free is None:
        return Room(wanted, at_once)
    most = int(max(0, free - weights) * _SHARE) // cost.ranks
    if wanted <= most:
        return Room(wanted, at_once)
    requests = most // cost.request_bytes - _NULL
    if requests < 1:
        raise UsageError(
            f"{byte_units.size(free)} of memory are free: the model takes "
            f"{byte_units.size(weights)}, and a request {byte_units.size(cost.request_bytes)}",
            hint="end what else runs here; -- --kv-cache-memory-bytes N tries it nevertheless",
        )
    return Room(most, requests, free)


def served_bytes(shards: Iterable[Shard], dtype: str) -> int:
    """Bytes of a checkpoint's numbers in `dtype`, one of `cost.DTYPES`."""
    import torch

    size = getattr(torch, dtype).itemsize
    tensors = [entry for shard in shards for entry in shard.tensors.values()]
    return sum(math.prod(entry.shape) for entry in tensors) * size


def free_memory() -> int | None:
    """Bytes that this process could have now, a container's limit counted; None: nobody says."""
    try:
        lines = dict(line.split(":") for line in _read("/proc/meminfo").splitlines())
        found = [int(lines["MemAvailable"].split()[0]) << 10]
    except (OSError, KeyError, ValueError):
        return None
    for limit, used, statistics, name in _LIMITS:
        try:
            most, taken = int(_read(_GROUPS / limit)), int(_read(_GROUPS / used))
            copies = dict(line.split() for line in _read(_GROUPS / statistics).splitlines())[name]
        except (OSError, KeyError, ValueError):  # "max", too
            continue
        found.append(max(0, most - taken + int(copies)))
    return min(found)


def _read(file: Path | str) -> str:
    return Path(file).read_text(encoding="ascii")


def _on_cpu() -> bool:
    return importlib.import_module("sparsek_vllm.allocator").on_cpu()
