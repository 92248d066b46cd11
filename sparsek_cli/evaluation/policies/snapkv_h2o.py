"""Rivals that read a prompt densely and evict when it ends: SnapKV's and H2O's rules, our bytes.

Together they keep as many pairs as the converted model has slots, and its window among them. The
prompt is read with ordinary attention and a whole cache, and the question is known when pairs are
chosen; a SparseK model has neither. In a conversation that is at the first question. From then on
the number of pairs stays as it is: the oldest pair of the window leaves it.

    snapkv  the prompt's last queries choose; what leaves the window is dropped
            (Li et al. 2024, arXiv 2404.14469: observation window 32, pooled over 5 neighbours)
    h2o     the attention that every pair has received so far chooses, also while answering
            (Zhang et al. 2023, arXiv 2306.14048)

Every KV head keeps as many pairs as any other, or (`:shared`) the best pairs of all layers and
heads stay, wherever they are: one threshold says how many each head keeps (Feng et al. 2024, arXiv
2407.11550, do it within a layer).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn import functional
from transformers.cache_utils import Cache

from sparsek_cli.evaluation.policies.evicting_layer import EvictingLayer, attention_mass
from sparsek_cli.evaluation.policies.head_budgets import slots_per_head
from sparsek_cli.evaluation.policies.policy import Policy
from sparsek_cli.models.attention.registration import replaced_attention
from sparsek_cli.models.cache.slots import cache_layers
from sparsek_cli.models.logits import Logits, masked_attention

OBSERVED = 32  # last queries of a prompt that choose for snapkv
POOLED = 5  # neighbours that a pair shares its attention with
DROPPED = -1.0  # below any mass: the first to go


class SnapLayer(EvictingLayer):
    """Keeps what the prompt's last queries look at.

    Attributes:
        padding: most tokens behind the end of a row's prompt, see `end_row`.
    """

    fresh = DROPPED
    padding = 0

    def __init__(self, slots: int, recent: int, sinks: int = 0):
        super().__init__(slots, recent, sinks)
        self.queries: torch.Tensor | None = None
        self.logits: Logits | None = None

    def see(self, query: torch.Tensor, logits: Logits) -> None:
        """Remembers the last `OBSERVED` queries of the prompt, wherever it may end."""
        if not self.bounded:
            count = OBSERVED + self.padding
            last = query[:, :, -count:]
            earlier = last[:, :, :0] if self.queries is None else self.queries
            self.queries = torch.cat([earlier, last], dim=2)[:, :, -count:]
            self.logits = logits

    def end_row(self, row: int, length: int) -> None:
        """Becomes one row, whose prompt was `length` tokens with at most `padding` behind it."""
        end = self.queries.shape[2] - (self.seen - length)
        self.queries = self.queries[row : row + 1, :, max(0, end - OBSERVED) : end]
        self.keys = self.keys[row : row + 1, :, :length]
        self.values = self.values[row : row + 1, :, :length]
        self.mass = self.mass[row : row + 1, :, :length]
        self.seen = length

    def rank(self) -> None:
        """Ranks all pairs by what the last queries saw in them and around them."""
        seen = attention_mass(self.queries, self.keys, self.logits)
        self.mass = functional.avg_pool1d(seen, POOLED, stride=1, padding=POOLED // 2)
        self.mass[:, :, -self.recent :] = DROPPED
        self.queries = None

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was."""
        super().reorder_cache(beam_idx)
        if self.queries is not None:
            self.queries = self.queries.index_select(0, beam_idx.to(self.queries.device))


class HeavyHitterLayer(EvictingLayer):
    """Keeps what has received the most attention so far."""

    def see(self, query: torch.Tensor, logits: Logits) -> None:
        """Adds the queries' attention to the mass of what they saw."""
        if not self.bounded:
            self.mass = self.mass + attention_mass(query, self.keys, logits)
            return
        grouped = query.unflatten(1, (self.keys.shape[1], -1))  # [B, G, h, n, D]
        found = (grouped @ self.keys[:, :, None].transpose(-1, -2)).float() * logits.scale
        hidden = ~self.visible(query.shape[2])[:, :, None]
        found = logits.capped(found).masked_fill(hidden, -torch.inf)
        self.mass += logits.weights(found).sum(dim=(2, 3))


def attend_once(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    visible: torch.Tensor,
    logits: Logits,
) -> torch.Tensor:
    """Attention of one token per row, [B, 1, H, D], without copies of the keys for every head.

    Args:
        query: [B, H, 1, D]. keys, values: [B, G, W, D]. visible: bool [B, G, 1, W].
    """
    if not logits.plain:
        seen = visible.repeat_interleave(query.shape[1] // keys.shape[1], dim=1)
        return masked_attention(query, keys, values, seen, logits).transpose(1, 2)
    grouped = query[:, :, 0].unflatten(1, (keys.shape[1], -1))  # heads of a group as queries
    mask = visible.expand(-1, -1, grouped.shape[2], -1)
    out = functional.scaled_dot_product_attention(grouped, keys, values, mask, scale=logits.scale)
    return out.flatten(1, 2)[:, None]


@contextmanager
def observed_attention(model: Any) -> Iterator[None]:
    """Within the block evicting layers see the queries of every attention call of `model`.

    Once they have slots, they also say which of them a query attends to.
    """
    current: Any = None

    def note(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        nonlocal current
        current = kwargs.get("past_key_values")

    def observing(attend: Callable) -> Callable:
        def observed(
            module: Any,
            query: torch.Tensor,
            key: Any,
            value: Any,
            attention_mask: Any,
            **kwargs: Any,
        ) -> Any:
            layer = None if current is None else current.layers[module.layer_idx]
            if isinstance(layer, EvictingLayer):
                logits = Logits.given(query, kwargs)
                layer.see(query, logits)
                if layer.bounded:
                    mask = layer.visible(query.shape[2])
                    if query.shape[2] == 1:
                        return attend_once(query, key, value, mask, logits), None
                    heads = query.shape[1] // mask.shape[1]
                    attention_mask = mask.repeat_interleave(heads, dim=1)
            return attend(module, query, key, value, attention_mask, **kwargs)

        return observed

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with replaced_attention(model.config._attn_implementation, observing):
            yield
    finally:
        hook.remove()


def evict(layers: Sequence[EvictingLayer], *, shared: bool) -> None:
    """Cuts the caches of a prompt to the slots of all layers and heads together.

    Args:
        layers: ranked, with the same number of pairs.
        shared: whether one threshold over all of them says what stays, else each head keeps as many
            pairs as any other. Each row of the batch is cut by itself.
    """
    slots = layers[0].slots
    worth = torch.stack([layer.worth() for layer in layers], dim=1)  # [B, layers, G, N]
    heads, total = worth.shape[1] * worth.shape[2], worth.shape[-1]
    if total <= slots:
        kept = torch.ones_like(worth, dtype=torch.bool)
    else:
        compared = worth.flatten(1) if shared else worth
        best = compared.topk(heads * slots if shared else slots, dim=-1).indices
        kept = torch.zeros_like(compared, dtype=torch.bool).scatter_(-1, best, value=True)
        kept = kept.view_as(worth)
    even = torch.full(worth.shape[:-1], slots, device=worth.device)
    capacity = kept.sum(dim=-1) if shared and total > slots else even
    for number, layer in enumerate(layers):
        layer.bound(kept[:, number], capacity[:, number])


@dataclass(frozen=True)
class Evicting(Policy):
    """Reads a prompt densely and keeps as many pairs of it as the model has slots.

    Attributes:
        shared: whether the slots are shared out over all layers and heads by one threshold.
        kind: the name of the rule.
    """

    shared: bool = False

    kind: ClassVar[str]
    sparse: ClassVar[bool] = False
    evicts_after_prompt: ClassVar[bool] = True
    keeps_sinks: ClassVar[bool] = False
    layer: ClassVar[type[EvictingLayer]]

    @property
    def name(self) -> str:
        """As users write it."""
        return f"{self.kind}:shared" if self.shared else self.kind

    def unfit_for(self, task: Any) -> str | None:
        """Rolling likelihoods have no prompt."""
        if task.OUTPUT_TYPE == "loglikelihood_rolling":
            return "it evicts when a prompt ends, and running text has no prompt"
        return None

    def rule(self, model: Any) -> AbstractContextManager:
        """Layers see the queries."""
        return observed_attention(model)

    def new_cache(self, model: Any) -> Cache:
        """Layers that hold as many pairs as the converted model's do on average."""
        block = model.config.sparsek
        sinks = block["sinks"] if self.keeps_sinks else 0
        settings = slots_per_head(model), block["window"], sinks
        return Cache(layers=cache_layers(model.config, lambda _: self.layer(*settings)))

    def end_prompt(self, model: Any, cache: Any) -> None:
        """From now on the cache is bounded."""
        # Layers of other kinds are bounded already.
        own = [layer for layer in cache.layers if isinstance(layer, EvictingLayer)]
        for layer in own:
            layer.rank()
        evict(own, shared=self.shared)


class SnapKV(Evicting):
    """The prompt's last queries choose what stays."""

    kind: ClassVar[str] = "snapkv"
    layer: ClassVar[type[EvictingLayer]] = SnapLayer


class H2O(Evicting):
    """The attention received so far chooses, also while answering."""

    kind: ClassVar[str] = "h2o"
    layer: ClassVar[type[EvictingLayer]] = HeavyHitterLayer
