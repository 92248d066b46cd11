"""Sequential oracles on the CPU: heaps, one candidate at a time (docs/method.md 2, choice a)."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction


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

    tau only rises: an element goes from full to interior to gone, in order of score. In exact
    rational arithmetic, because where tau is not unique a rounding error decides which end of
    the stretch a sweep stops at (the lower one is right).
    """
    full: list[Fraction] = []
    interior: list[Fraction] = []
    taus: list[float] = []
    tau: Fraction | None = None  # None: still at most k candidates
    total = Fraction(0)
    for t, value in enumerate(scores):
        score = Fraction(value)
        if tau is None or score - 1 >= tau:
            heapq.heappush(full, score)
        elif score > tau:
            heapq.heappush(interior, score)
            total += score
        if t + 1 <= k:
            taus.append(-math.inf)
            continue
        if tau is None:
            tau = full[0] - 1
        while interior or len(full) > k:
            events = [full[0] - 1] if full else []
            event = min(events + interior[:1])
            if interior:
                goal = (total + len(full) - k) / len(interior)
                if goal <= event:
                    tau = goal
                    break
            tau = event
            if interior and interior[0] == event:
                total -= heapq.heappop(interior)
            else:
                moved = heapq.heappop(full)
                heapq.heappush(interior, moved)
                total += moved
        taus.append(float(tau))
    return taus
