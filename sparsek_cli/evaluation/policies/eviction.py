"""Rivals that read a prompt densely and evict when it ends: SnapKV's and H2O's rules, our bytes.

Both keep as many pairs per KV head as the converted model has slots, and its window among them. The
prompt is read with ordinary attention and a whole cache, and the question is known when pairs are
chosen; a SparseK model has neither. In a conversation that is at the first question. From then on
the number of pairs stays as it is: the oldest pair of the window leaves it.

    snapkv  the prompt's last queries choose; what leaves the window is dropped
            (Li et al. 2024, arXiv 2404.14469: observation window 32, pooled over 5 neighbours)
    h2o     the attention that every pair has received so far chooses, also while answering
            (Zhang et al. 2023, arXiv 2306.14048)
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

import torch
from torch.nn import functional
from transformers.cache_utils import Cache, DynamicLayer

from sparsek_cli.evaluation.policies.head_budgets import slots_per_head
from sparsek_cli.evaluation.policies.policy import Policy
from sparsek_cli.models.attention import replaced_attention

OBSERVED = 32  # last queries of a prompt that choose for snapkv
POOLED = 5  # neighbours that a pair shares its attention with
BLOCK_BYTES = 1 << 28  # attention weights formed at once
DROPPED = -1.0  # below any mass: the first to go


def attention_mass(query: torch.Tensor, keys: torch.Tensor, scaling: float) -> torch.Tensor:
    """How much causal attention each key receives from all queries and heads of its group.

    Rows are done in blocks, so that no [queries, keys] matrix is held.

    Args:
        query: [B, H, Q, D], the last Q of the tokens that `keys` [B, G, N, D] are of.
        scaling: factor of the logits.

    Returns:
        Sums of attention weights, float32 [B, G, N].
    """
    batch, heads, count, _ = query.shape
    groups, total = keys.shape[1], keys.shape[2]
    mass = torch.zeros(batch, groups, total, device=keys.device)
    step = max(1, BLOCK_BYTES // (4 * batch * heads * total))
    for start in range(0, count, step):
        rows = query[:, :, start : start + step].unflatten(1, (groups, -1))  # [B, G, h, r, D]
        first = total - count + start  # position of the block's first query
        stop = first + rows.shape[3]
        logits = (rows @ keys[:, :, None, :stop].transpose(-1, -2)).float() * scaling
        later = torch.ones(rows.shape[3], stop, dtype=torch.bool, device=keys.device)
        logits.masked_fill_(later.triu(first + 1), -torch.inf)
        mass[:, :, :stop] += logits.softmax(dim=-1).sum(dim=(2, 3))
    return mass


class EvictingLayer(DynamicLayer):
    """One layer's cache: grows while the prompt is read, then holds at most `slots` pairs.

    Args:
        slots: pairs per KV head once the prompt has ended.
        recent: how many of them are the newest ones.

    Attributes:
        mass: what pairs are ranked by, float32 [B, G, N]. seen: tokens so far.
        bounded: whether the prompt has ended.
    """

    is_croppable = False
    fresh = 0.0  # mass of a new pair

    def __init__(self, slots: int, recent: int):
        super().__init__()
        self.slots, self.recent = slots, recent
        self.seen, self.bounded = 0, False
        self.mass: torch.Tensor | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Makes room when the prompt has ended, then appends [B, G, n, D]."""
        new = key_states.shape[-2]
        if self.bounded:
            self._evict(room=new)
        held = super().update(key_states, value_states, *args, **kwargs)
        if self.mass is None:
            self.mass = torch.full(key_states.shape[:3], self.fresh, device=key_states.device)
        else:
            self.mass = functional.pad(self.mass, (0, new), value=self.fresh)
        self.seen += new
        return held

    def see(self, query: torch.Tensor, scaling: float) -> None:
        """Notes the queries [B, H, n, D] of the newest pairs."""

    def end_prompt(self) -> None:
        """From now on at most `slots` pairs are held."""
        self.bounded = True
        self._evict(room=0)

    def _evict(self, room: int) -> None:
        """Drops the lowest pairs outside the window until `room` new ones fit."""
        total, older = self.keys.shape[2], self.slots - self.recent
        if total + room <= self.slots:
            return
        newest = min(total, self.recent - room)
        best = self.mass[:, :, : total - newest].topk(min(older, total - newest)).indices
        kept = torch.arange(total - newest, total, device=best.device)
        kept = kept.expand(*best.shape[:2], newest)
        index = torch.cat([best.sort(dim=-1).values, kept], dim=-1)
        self.mass = self.mass.gather(2, index)
        rows = index[..., None].expand(*index.shape, self.keys.shape[-1])
        self.keys = self.keys.gather(2, rows)
        self.values = self.values.gather(2, rows)

    def get_seq_length(self) -> int:
        """Tokens seen: what positions continue from."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that a chunk of `query_length` tokens meets, and how many are gone before them."""
        held = 0 if self.keys is None else self.keys.shape[2]
        if self.bounded:
            held = min(held, self.slots - query_length)
        return held + query_length, self.seen - held

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was."""
        super().reorder_cache(beam_idx)
        if self.mass is not None:
            self.mass = self.mass.index_select(0, beam_idx.to(self.mass.device))


class SnapLayer(EvictingLayer):
    """Keeps what the prompt's last queries look at."""

    fresh = DROPPED

    def __init__(self, slots: int, recent: int):
        super().__init__(slots, recent)
        self.queries: torch.Tensor | None = None
        self.scaling = 1.0

    def see(self, query: torch.Tensor, scaling: float) -> None:
        """Remembers the last `OBSERVED` queries of the prompt."""
        if not self.bounded:
            last = query[:, :, -OBSERVED:]
            earlier = last[:, :, :0] if self.queries is None else self.queries
            self.queries = torch.cat([earlier, last], dim=2)[:, :, -OBSERVED:]
            self.scaling = scaling

    def end_prompt(self) -> None:
        """Ranks all pairs by what the last queries saw in them and around them."""
        seen = attention_mass(self.queries, self.keys, self.scaling)
        self.mass = functional.avg_pool1d(seen, POOLED, stride=1, padding=POOLED // 2)
        self.mass[:, :, -self.recent :] = DROPPED
        self.queries = None
        super().end_prompt()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was."""
        super().reorder_cache(beam_idx)
        if self.queries is not None:
            self.queries = self.queries.index_select(0, beam_idx.to(self.queries.device))


class HeavyHitterLayer(EvictingLayer):
    """Keeps what has received the most attention so far."""

    def see(self, query: torch.Tensor, scaling: float) -> None:
        """Adds the queries' attention to the mass of what they saw."""
        self.mass = self.mass + attention_mass(query, self.keys, scaling)


@contextmanager
def observed_attention(model: Any) -> Iterator[None]:
    """Within the block evicting layers see the queries of every attention call of `model`."""
    current: Any = None

    def note(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        nonlocal current
        current = kwargs.get("past_key_values")

    def observing(attend: Callable) -> Callable:
        def observed(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            layer = None if current is None else current.layers[module.layer_idx]
            if isinstance(layer, EvictingLayer):
                scaling = kwargs.get("scaling")
                layer.see(query, query.shape[-1] ** -0.5 if scaling is None else scaling)
            return attend(module, query, *args, **kwargs)

        return observed

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with replaced_attention(model.config._attn_implementation, observing):
            yield
    finally:
        hook.remove()


class Evicting(Policy):
    """Reads a prompt densely and keeps `slots` pairs of it when it ends."""

    sparse: ClassVar[bool] = False
    evicts_after_prompt: ClassVar[bool] = True
    layer: ClassVar[type[EvictingLayer]]

    def unfit_for(self, requests: str) -> str | None:
        """Rolling likelihoods have no prompt."""
        if requests == "loglikelihood_rolling":
            return "it evicts when a prompt ends, and running text has no prompt"
        return None

    def rule(self, model: Any) -> AbstractContextManager:
        """Layers see the queries."""
        return observed_attention(model)

    def new_cache(self, model: Any) -> Cache:
        """Layers that hold as many pairs as the converted model's do on average."""
        slots, window = slots_per_head(model), model.config.sparsek["window"]
        layers = range(model.config.num_hidden_layers)
        return Cache(layers=[self.layer(slots, window) for _ in layers])

    def end_prompt(self, model: Any, cache: Any) -> None:
        """From now on the cache is bounded."""
        for layer in cache.layers:
            layer.end_prompt()


class SnapKV(Evicting):
    """The prompt's last queries choose what stays."""

    name: ClassVar[str] = "snapkv"
    layer: ClassVar[type[EvictingLayer]] = SnapLayer


class H2O(Evicting):
    """The attention received so far chooses, also while answering."""

    name: ClassVar[str] = "h2o"
    layer: ClassVar[type[EvictingLayer]] = HeavyHitterLayer
