"""Milliseconds and bytes of calls, measured fairly: warmed up, interleaved, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def interleaved_ms(
    calls: dict[str, Callable[[], object]], device: torch.device, repeats: int
) -> dict[str, float]:
    """Median milliseconds of each call; every round times each of them once."""
    for call in calls.values():
        for _ in range(2):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(_once(call, device))
    return {name: statistics.median(values) for name, values in times.items()}


def _once(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # Work ahead of the clock, so that the launches of a long call overlap with it.
    torch.cuda._sleep(8_000_000)
    start.record()
    call()
    stop.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(stop)


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Most memory allocated during one call beyond what stood before; None off CUDA."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def graphed(call: Callable[[], object]) -> Callable[[], object]:
    """The call as a replayed CUDA graph: its own time without launch gaps."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def copy_bandwidth(device: torch.device, size: int = 1 << 31) -> float:
    """Bytes per second of a device-to-device copy, read and written both counted."""
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    ms = interleaved_ms({"copy": lambda: target.copy_(source)}, device, 5)["copy"]
    return 2 * size / ms * 1e3
