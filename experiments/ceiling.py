"""What selection alone could reach: at each query the keys that are looked at most from then on.

No scorer can know that, and no cache could follow it, for a key may come back. So this is above
every policy that keeps as many pairs in the same heads, up to what one key more or less is worth
beside others: what it leaves of the loss between a window and dense attention is not the scorers'.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sparsek_cli.models.attention.registration import replaced_attention
from sparsek_cli.models.config import ATTENTION, layer_budget


def kept_from_then_on(
    weights: torch.Tensor, topk: torch.Tensor, window: int, sinks: int
) -> torch.Tensor:
    """[G, N, N] bool: the keys that each query sees.

    Args:
        weights: [G, heads of the group, N, N] dense attention probabilities.
        topk: [G] int64, selected keys.
    """
    groups, tokens = weights.shape[0], weights.shape[-1]
    places = torch.arange(tokens, device=weights.device)
    age = places[:, None] - places
    candidates = (age >= window) & (places >= sinks)
    later = weights.amax(1).flip(1).cummax(1).values.flip(1)
    later = later.masked_fill(~candidates, -1.0)
    most = int(topk.max().clamp(1, tokens))
    best = later.topk(most, dim=-1).values
    last = (topk.clamp(1, most) - 1)[:, None, None].expand(groups, tokens, 1)
    selected = (later >= best.gather(-1, last)) & (topk > 0)[:, None, None]
    seen = (age >= 0) & ((age < window) | (places < sinks))
    return (selected & candidates) | seen


def _attend(module: Any, query, key, value, mask, scaling=None, **kwargs: Any) -> tuple:
    """Shapes as in `sparsek_attention_forward`; whole sequences without padding."""
    budget = layer_budget(module.config, module.layer_idx)
    (heads, tokens, size), groups = query.shape[1:], key.shape[1]
    topk = torch.tensor(budget.topk, device=query.device).expand(groups)
    scaling = size**-0.5 if scaling is None else scaling
    rows = []
    for q, k, v in zip(query, key, value, strict=True):
        q = q.view(groups, heads // groups, tokens, size).float() * scaling
        logits = q @ k.float()[:, None].transpose(2, 3)
        later = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).triu(1)
        weights = logits.masked_fill_(later, -torch.inf).softmax(-1)
        seen = kept_from_then_on(weights, topk, budget.window, budget.sinks)
        weights = logits.masked_fill_(~seen[:, None], -torch.inf).softmax(-1)
        rows.append((weights @ v.float()[:, None]).flatten(0, 1))
    return torch.stack(rows).transpose(1, 2).to(query.dtype), None


@contextmanager
def applied() -> Iterator[None]:
    """Within the block converted models attend so, with their own budgets."""
    with replaced_attention(ATTENTION, lambda _: _attend):
        yield
