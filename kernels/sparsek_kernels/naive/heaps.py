"""Sequential oracles on the CPU: heaps, one candidate at a time (method, section 2, choice a)."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence


def heap_selection(scores: Sequence[float], k: int) -> list[int]:
    """End of each candidate's run among the k best of its prefix; its own index if never in.

    A min-heap of the kept set by (score, later first): of equal scores the earlier stays.
    """
    end = list(range(len(scores)))
    heap: list[tuple[float, int]] = []
    for t, score in enumerate(scores):
        if k == 0:
            break
        heapq.heappush(heap, (score, -t))
        if len(heap) > k:
            loser = -heapq.heappop(heap)[1]
            end[loser] = t
    for _, kept in heap:
        end[-kept] = len(scores)
    return end


def heap_thresholds(scores: Sequence[float], k: int) -> list[float]:
    """tau after each candidate, by two heaps: full elements (p = 1) and interior ones.

    tau only rises: an element goes from full to interior to gone, in order of score.
    """
    full: list[float] = []
    interior: list[float] = []
    tau, taus, total = -math.inf, [], 0.0
    for t, score in enumerate(scores):
        heapq.heappush(full, score) if score - 1 >= tau else None
        if tau < score and score - 1 < tau:
            heapq.heappush(interior, score)
            total += score
        if t + 1 <= k:
            taus.append(tau)
            continue
        while True:
            if interior:
                goal = (total + len(full) - k) / len(interior)
            else:
                goal = math.inf if len(full) > k else tau
            enters = full[0] - 1 if full else math.inf
            leaves = interior[0] if interior else math.inf
            event = min(enters, leaves)
            if event >= goal or event == math.inf:
                tau = max(tau, goal)
                break
            tau = max(tau, event)
            if enters <= leaves:
                moved = heapq.heappop(full)
                heapq.heappush(interior, moved)
                total += moved
            else:
                total -= heapq.heappop(interior)
        taus.append(tau)
    return taus
