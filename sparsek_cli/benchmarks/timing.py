"""Milliseconds and bytes of calls, measured fairly: warmed up, settled, interleaved, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

Calls = dict[str, Callable[[], object]]
AHEAD = 8_000_000  # cycles that the device sleeps while a call's launches are queued
# Seconds for which a call has the device to itself before it is timed. A dense rival of a quarter
# of a second draws all the power there is, and whatever came right after it ran at its low clocks.
SETTLE = 0.2


def interleaved_ms(
    calls: Calls,
    device: torch.device,
    repeats: int,
    ahead: int = AHEAD,
    settle: float | None = None,
) -> dict[str, float]:
    """Median milliseconds of each call; every round times each of them once.

    Args:
        ahead: cycles for which a CUDA device sleeps before each call. What its launches take
            beyond that counts.
        settle: seconds for which a call is repeated before it is timed, so that it runs at the
            clocks that it has by itself; None is `SETTLE` on a CUDA device, else 0.
    """
    cuda = device.type == "cuda"
    seconds = (SETTLE if cuda else 0.0) if settle is None else settle

    def once(call: Callable[[], object]) -> float:
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            call()
            if cuda:
                torch.cuda.synchronize(device)
        return _once(call, device, ahead)

    return _interleaved(calls, once, repeats, warm=2)


def waited_ms(calls: Calls, device: torch.device, repeats: int) -> dict[str, float]:
    """As `interleaved_ms`, but from an idle device until it is idle again, launches and all."""

    def once(call: Callable[[], object]) -> float:
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        torch.cuda.synchronize(device)
        return 1e3 * (time.perf_counter() - start)

    return _interleaved(calls, once, repeats, warm=2)


def process_ms(calls: Calls, repeats: int) -> dict[str, float]:
    """As `interleaved_ms`, but the CPU time of this process, which others hardly change."""

    def once(call: Callable[[], object]) -> float:
        begin = time.process_time()
        call()
        return 1e3 * (time.process_time() - begin)

    return _interleaved(calls, once, repeats, warm=1)


def _interleaved(
    calls: Calls, once: Callable[..., float], repeats: int, warm: int
) -> dict[str, float]:
    for call in calls.values():
        for _ in range(warm):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(once(call))
    return {name: statistics.median(values) for name, values in times.items()}


def _once(call: Callable[[], object], device: torch.device, ahead: int) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # Work ahead of the clock, so that the launches of a long call overlap with it.
    torch.cuda._sleep(ahead)
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
    source = torch.empty(size, dtype=torch.uint8, device=device)
    if device.type == "cuda":
        source.random_()  # a copy of zeros draws less power
    else:
        source.fill_(1)  # drawing takes a CPU longer than copying
    target = torch.empty_like(source)
    ms = interleaved_ms({"copy": lambda: target.copy_(source)}, device, 5)["copy"]
    return 2 * size / ms * 1e3
