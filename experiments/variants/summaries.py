"""A few slots per head for what was evicted: running means of pairs, with the log of their count.

A summary is one more key in the softmax, the mean of those that it stands for, and its logit is
raised by the log of how many they are: by Jensen's inequality no more than they had together. It
takes the slot of a selected pair, so that the cache keeps its size; heads that select fewer than
there would be summaries have none.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from sparsek_kernels.keys import list_keys
from sparsek_kernels.pytorch.selection import select
from sparsek_kernels.scores import effective_scores
from sparsek_kernels.state import SlotLayout

from sparsek_cli.models.attention.registration import replaced_attention
from sparsek_cli.models.config import ATTENTION, layer_budget


class Means(NamedTuple):
    """What the summaries of G heads hold when each of N queries looks.

    Attributes:
        keys, values: float32 [G, N, S, D]. counts: float32 [G, N, S], pairs that went into each.
    """

    keys: torch.Tensor
    values: torch.Tensor
    counts: torch.Tensor


def gone(
    key: torch.Tensor, scores: torch.Tensor, slopes: torch.Tensor | None, layout: SlotLayout
) -> torch.Tensor:
    """int64 [G, N]: the first query that no longer sees each key; N and more: none.

    Args:
        key: [G, N, D]. scores: [G, N].
    """
    tokens = key.shape[1]
    places = torch.arange(tokens, device=key.device)
    effective = effective_scores(scores[None], slopes, places[None])
    keys = list_keys(key[None], key[None], effective, places[None], layout, None)
    selected = select(keys, layout)[0, :, -tokens:].long()
    return torch.maximum(selected, places + layout.window)


def running_means(
    key: torch.Tensor, value: torch.Tensor, leaves: torch.Tensor, has: torch.Tensor, count: int
) -> Means:
    """Each evicted pair goes to an empty summary or to the one whose key points most its way.

    Args:
        key, value: [G, N, D]. leaves: [G, N], see `gone`. has: bool [G], heads with summaries.
        count: summaries of a head.
    """
    groups, tokens, size = key.shape
    heads = torch.arange(groups, device=key.device)
    # One pair at most leaves a head at a query, as one comes.
    who = torch.full((groups, tokens), -1, device=key.device)
    head, place = torch.nonzero((leaves < tokens) & has[:, None], as_tuple=True)
    who[head, leaves[head, place]] = place
    sums = key.new_zeros(groups, count, 2 * size, dtype=torch.float32)
    counts = sums.new_zeros(groups, count)
    pairs, directions = torch.cat([key, value], -1).float(), key.float()
    kept = []
    for query in range(tokens):
        pair = who[:, query]
        there = pair >= 0
        if there.any():
            new = pairs[heads, pair.clamp(min=0)]
            near = torch.cosine_similarity(
                sums[..., :size], directions[heads, pair.clamp(min=0)][:, None], -1
            )
            chosen = near.masked_fill(counts == 0, 2.0).argmax(-1)
            sums = sums.index_put((heads, chosen), new * there[:, None], accumulate=True)
            counts = counts.index_put((heads, chosen), there.float(), accumulate=True)
        kept.append((sums, counts))
    sums, counts = (torch.stack(each, 1) for each in zip(*kept, strict=True))
    means = sums / counts.clamp(min=1)[..., None]
    return Means(means[..., :size], means[..., size:], counts)


def _attend(
    count: int, raised: float, module: Any, query, key, value, mask, *,
    sparsek_scores, sparsek_slopes=None, scaling=None, **kwargs: Any,
) -> tuple:  # fmt: skip
    """Shapes as in `sparsek_attention_forward`; whole sequences without padding."""
    budget = layer_budget(module.config, module.layer_idx)
    (heads, tokens, size), groups = query.shape[1:], key.shape[1]
    topk = torch.tensor(budget.topk, device=query.device).expand(groups)
    has = topk >= count
    layout = SlotLayout(tuple((topk - count * has).tolist()), budget.window, budget.sinks)
    scaling = size**-0.5 if scaling is None else scaling
    places = torch.arange(tokens, device=query.device)
    rows = []
    for q, k, v, scores in zip(query, key, value, sparsek_scores, strict=True):
        leaves = gone(k, scores, sparsek_slopes, layout)
        seen = (places <= places[:, None]) & (places[:, None] < leaves[:, None])  # [G, N, N]
        means = running_means(k, v, leaves, has, count)
        q = q.view(groups, heads // groups, tokens, size).float() * scaling
        logits = q @ k.float()[:, None].transpose(2, 3)
        logits = logits.masked_fill_(~seen[:, None], -torch.inf)
        theirs = (q[..., None, :] * means.keys[:, None]).sum(-1)
        theirs += raised + means.counts[:, None].log()
        weights = torch.cat([logits, theirs], -1).softmax(-1)
        out = weights[..., :tokens] @ v.float()[:, None]
        out += (weights[..., tokens:, None] * means.values[:, None]).sum(-2)
        rows.append(out.flatten(0, 1))
    return torch.stack(rows).transpose(1, 2).to(query.dtype), None


@contextmanager
def applied(count: int, raised: float = 0.0) -> Iterator[None]:
    """Within the block converted models have `count` summaries in each head.

    `raised` is added to their logits, in nats: pairs differ, so that they had more together.
    """
    with replaced_attention(ATTENTION, lambda _: partial(_attend, count, raised)):
        yield
