"""How a total of pairs is spread over layers and KV heads, and spent on the newest ones."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def per_head(model: Any) -> list[list[int]]:
    """Selected pairs of every layer with SparseK attention, and KV head."""
    from sparsek_cli.models import kv_heads, layer_budget, sparse_layers

    config = model.config
    rows = (layer_budget(config, layer).topk for layer in sparse_layers(config))
    return [[row] * kv_heads(config) if isinstance(row, int) else list(row) for row in rows]


def slots_per_head(model: Any) -> int:
    """Pairs that a KV head holds on average, rounded down: never more bytes than the model's."""
    block = model.config.sparsek
    flat = [k for row in per_head(model) for k in row]
    return block["sinks"] + sum(flat) // len(flat) + block["window"]


def scaled(per_head: list[list[int]], mean: int) -> list[list[int]]:
    """The same proportions with `mean` pairs on average, to the pair."""
    return _summing_to(per_head, mean * sum(map(len, per_head)))


def _summing_to(per_head: list[list[int]], wanted: int) -> list[list[int]]:
    """The same proportions with `wanted` pairs in all."""
    flat = [k for row in per_head for k in row]
    exact = [k * wanted / max(1, sum(flat)) for k in flat]
    whole = [int(k) for k in exact]
    # What rounding down left over goes to those that lost most by it.
    order = sorted(range(len(flat)), key=lambda i: whole[i] - exact[i])
    for i in order[: wanted - sum(whole)]:
        whole[i] += 1
    heads = len(per_head[0])
    return [whole[start : start + heads] for start in range(0, len(whole), heads)]


def by_layer(model: Any, rows: list[list[int]]) -> list[list[int] | None]:
    """`per_head`'s rows as a `topk` of the `sparsek` block: None for layers of other kinds."""
    from sparsek_cli.models import sparse_layers

    own = dict(zip(sparse_layers(model.config), rows, strict=True))
    return [own.get(layer) for layer in range(model.config.num_hidden_layers)]


@contextmanager
def evenly(model: Any) -> Iterator[int | None]:
    """The model's selected pairs spread evenly over all heads: uneven ones are SparseK's own idea.

    Yields:
        Pairs per head; None where they do not divide: some heads then have one more than others.
    """
    from sparsek_cli import models

    rows = per_head(model)
    total, heads = sum(map(sum, rows)), sum(map(len, rows))
    if total % heads:
        equal = [[1] * len(row) for row in rows]
        with models.budget(model, topk=by_layer(model, _summing_to(equal, total))):
            yield None
    else:
        with models.budget(model, topk=total // heads):
            yield total // heads


@contextmanager
def as_window(model: Any) -> Iterator[None]:
    """The model's pairs spent on the newest ones; nothing stands in for the others."""
    from sparsek_cli import models

    window = model.config.sparsek["window"]
    with evenly(model) as topk, models.replaced_scorers(model, recency):
        if topk is not None:
            with models.budget(model, topk=0, window=window + topk):
                yield
        else:  # budgets differ by a pair, windows cannot: the newest pairs win by their scores
            yield


def recency(attention: Any) -> Any:
    import torch

    from sparsek_cli.models import kv_heads

    class RecencyScorer(torch.nn.Module):
        """Scores [B, G, N] that are the positions, slopes 0: the newest candidates are the best."""

        reads_positions = True

        def __init__(self, heads: int):
            super().__init__()
            self.heads = heads
            self.register_buffer("slopes", torch.zeros(heads), persistent=False)

        def forward(self, hidden_states: Any, position_ids: Any = None) -> Any:
            batch, tokens = hidden_states.shape[:2]
            positions = position_ids.expand(batch, tokens).float()
            scores = positions[:, None, :].expand(batch, self.heads, tokens).contiguous()
            return scores, self.slopes

    return RecencyScorer(kv_heads(attention.config))
