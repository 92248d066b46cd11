"""Requests that begin with the same tokens, so that the shared part is read once.

Long-context tasks ask many questions about one document. The grouping here is about tokens, never
about text, so feeding the shared part first and the rest after it is the same computation as
feeding each prompt whole, up to rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

MIN_SHARED = 64  # tokens; below this the bookkeeping costs more than it saves


@dataclass
class Group:
    """Sequences with a common start.

    Attributes:
        prefix: how many of their first tokens are common and may be fed first.
        members: indices into the list that was grouped.
    """

    prefix: int
    members: list[int]


def group_by_prefix(sequences: Sequence[Sequence[int]], longest: Sequence[int]) -> list[Group]:
    """Groups `sequences` by shared beginnings; longest sequences first, so that memory fails early.

    Args:
        sequences: token ids.
        longest: for each, the most tokens that may be taken into the shared part (the answer's
            logits must come from the rest).

    Returns:
        Groups that hold every index once. A group of one has prefix 0.
    """
    order = sorted(range(len(sequences)), key=lambda i: tuple(sequences[i]))
    groups: list[Group] = []
    for index in order:
        if groups:
            last = groups[-1]
            lead = sequences[last.members[0]]
            limit = min(last.prefix, longest[index])
            shared = common(lead, sequences[index], limit)
            # A much shorter common start would give up what the group already shares.
            if shared >= MIN_SHARED and (2 * shared >= last.prefix or len(last.members) == 1):
                last.members.append(index)
                last.prefix = shared
                continue
        groups.append(Group(longest[index], [index]))
    for group in groups:
        if len(group.members) == 1:
            group.prefix = 0
    return sorted(groups, key=lambda g: -max(len(sequences[i]) for i in g.members))


def common(a: Sequence[int], b: Sequence[int], limit: int | None = None) -> int:
    """How many first items `a` and `b` have in common, at most `limit`."""
    limit = min(len(a), len(b), *([] if limit is None else [limit]))
    if a[:limit] == b[:limit]:
        return limit
    low, high = 0, limit  # equal at low, different at high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle)
    return low
