"""A linear map after attention, in closed form, that brings sparse outputs nearer to dense ones.

Gradient-free: a converted model reads text, and each layer's sparse outputs are regressed on what
dense attention would have put out for the same queries, keys and values. `patched` then adds to
each output what is missing, at queries of which something has been evicted: where everything fits,
the model stays its dense self. By layer it is a change of W_o; by head a matrix of the head's own.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sparsek_cli.conversion.calibrate.scorers.ridge import LinearMap, Moments, ridge
from sparsek_cli.models.attention.registration import replaced_attention
from sparsek_cli.models.block_attention import causal_attention
from sparsek_cli.models.config import ATTENTION, layer_budget
from sparsek_cli.models.logits import Logits

# By name, how many heads share a matrix: all of a layer, or one.
KINDS = ("layer", "head")


def evicted(module: Any, tokens: int, heads: int) -> torch.Tensor:
    """[N, H] bool on the CPU: queries of which each head has dropped a key."""
    budget = layer_budget(module.config, module.layer_idx)
    topk = torch.tensor(budget.topk).reshape(-1)
    slots = (topk + budget.sinks + budget.window).repeat_interleave(heads // len(topk))
    return torch.arange(tokens)[:, None] >= slots


@torch.no_grad()
def fit(model: Any, rows: torch.Tensor, kind: str) -> dict[int, list[LinearMap]]:
    """Maps by layer, one or one per head, from texts rows [R, N] of token ids."""
    moments: dict[int, list[Moments]] = {}

    def watched(attend: Callable) -> Callable:
        def look(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
            out, weights = attend(module, query, key, value, mask, **kwargs)
            dense = causal_attention(query, key, value, Logits.given(query, kwargs)).transpose(1, 2)
            heads, size = out.shape[2:]
            some = evicted(module, out.shape[1], heads)
            wide = heads * size if kind == "layer" else size
            if module.layer_idx not in moments:
                count = heads * size // wide
                moments[module.layer_idx] = [Moments(wide, wide, out.device) for _ in range(count)]
            where = some.any(1) if kind == "layer" else some
            for head, own in enumerate(moments[module.layer_idx]):
                rows_ = where if kind == "layer" else where[:, head]
                pick = slice(None) if kind == "layer" else slice(head, head + 1)
                x, y = (t[:, rows_, pick].flatten(2).flatten(0, 1) for t in (out, dense - out))
                own.add(x, y)
            return out, weights

        return look

    with replaced_attention(ATTENTION, watched):
        for row in rows:
            model(row[None].to(model.device), use_cache=False, logits_to_keep=1)
    return {n: [ridge(m) if m.rows else None for m in each] for n, each in moments.items()}


@contextmanager
def patched(maps: dict[int, list[LinearMap]]) -> Iterator[None]:
    """Within the block attention of the models called adds what `fit` found missing."""

    def watched(attend: Callable) -> Callable:
        def mend(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
            out, weights = attend(module, query, key, value, mask, **kwargs)
            each, (heads, size) = maps[module.layer_idx], out.shape[2:]
            some = evicted(module, out.shape[1], heads).to(out.device)
            x = out.flatten(2).unflatten(2, (len(each), -1)).float()
            if len(each) == 1:
                some = some.any(1, keepdim=True)
            missing = torch.stack(
                [
                    torch.zeros_like(x[:, :, n]) if m is None
                    else x[:, :, n] @ m.weight.T.float() + m.bias.float()
                    for n, m in enumerate(each)
                ],
                2,
            )  # fmt: skip
            missing = (missing * some[..., None]).flatten(2).unflatten(2, (heads, size))
            return out + missing.to(out.dtype), weights

        return mend

    with replaced_attention(ATTENTION, watched):
        yield
