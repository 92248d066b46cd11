"""A layer's cache that grows while a prompt is read and holds a bounded number of pairs after it.

Then it has slots that never move: a new pair takes the slot of the pair that is worth least. Heads
and rows may hold different numbers of pairs, and see no more than their own.
"""

from typing import Any

import torch
from torch.nn import functional
from transformers.cache_utils import DynamicLayer

from sparsek_cli.models.logits import Logits

BLOCK_BYTES = 1 << 28  # attention weights formed at once
GROWTH = 64  # slots added at once while a prompt that fits goes on


def attention_mass(query: torch.Tensor, keys: torch.Tensor, logits: Logits) -> torch.Tensor:
    """How much causal attention each key receives from all queries and heads of its group.

    Args:
        query: [B, H, Q, D], the last Q of the tokens that `keys` [B, G, N, D] are of.
        logits: how weights are made of queries and keys.

    Returns:
        Sums of attention weights, float32 [B, G, N].
    """
    mass = torch.zeros(*keys.shape[:3], device=keys.device)
    for weights in causal_weights(query, keys, logits):
        mass[:, :, : weights.shape[-1]] += weights.sum(dim=(2, 3))
    return mass


def largest_attention(query: torch.Tensor, keys: torch.Tensor, logits: Logits) -> torch.Tensor:
    """The largest causal attention each key receives; shapes as in `attention_mass`."""
    largest = torch.zeros(*keys.shape[:3], device=keys.device)
    for weights in causal_weights(query, keys, logits):
        seen = largest[:, :, : weights.shape[-1]]
        torch.maximum(seen, weights.amax(dim=(2, 3)), out=seen)
    return largest


def causal_weights(query: torch.Tensor, keys: torch.Tensor, logits: Logits) -> Any:
    """Attention weights of blocks of queries, so that no [queries, keys] matrix is held.

    Yields:
        float32 [B, G, heads of a group, queries of the block, keys up to its last one].
    """
    batch, heads, count, _ = query.shape
    groups, total = keys.shape[1], keys.shape[2]
    step = max(1, BLOCK_BYTES // (4 * batch * heads * total))
    for start in range(0, count, step):
        rows = query[:, :, start : start + step] * logits.scale
        rows = rows.unflatten(1, (groups, -1))  # [B, G, h, r, D]
        first = total - count + start  # position of the block's first query
        stop = first + rows.shape[3]
        found = logits.capped(rows @ keys[:, :, None, :stop].transpose(-1, -2))
        own = torch.ones(rows.shape[3], rows.shape[3], dtype=torch.bool, device=keys.device)
        found[..., first:].masked_fill_(own.triu(1), -torch.inf)
        yield logits.weights(found)


class EvictingLayer(DynamicLayer):
    """One layer's cache: whole while the prompt is read, then at most `capacity` pairs per head.

    Args:
        slots: pairs that a KV head of the model holds on average once the prompt has ended.
        recent: how many of them are the newest ones.
        sinks: how many first ones always stay.

    Attributes:
        mass: what pairs are ranked by, float32 [B, G, W]. seen: tokens so far of the longest row.
        places: position of the pair in each slot, -1 if there is none, int64 [B, G, W]; None until
            the prompt has ended.
        capacity: pairs that each head may hold, int64 [B, G]. after: [B], each row's next position.
    """

    is_croppable = False
    fresh = 0.0  # mass of a new pair

    def __init__(self, slots: int, recent: int, sinks: int = 0):
        super().__init__()
        self.slots, self.recent, self.sinks = slots, recent, sinks
        self.seen = self.widest = 0
        self.mass: torch.Tensor | None = None
        self.places: torch.Tensor | None = None
        self.capacity: torch.Tensor | None = None
        self.after: torch.Tensor | None = None

    @property
    def bounded(self) -> bool:
        """Whether the prompt has ended."""
        return self.places is not None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds [B, G, n, D]; once the prompt has ended n is at most `recent`, and as many go."""
        new = key_states.shape[-2]
        self.seen += new
        if self.bounded:
            self._replace(key_states, value_states)
            return self.keys, self.values
        held = super().update(key_states, value_states, *args, **kwargs)
        if self.mass is None:
            self.mass = torch.full(key_states.shape[:3], self.fresh, device=key_states.device)
        else:
            self.mass = functional.pad(self.mass, (0, new), value=self.fresh)
        return held

    def see(self, query: torch.Tensor, logits: Logits) -> None:
        """Notes the queries [B, H, n, D] of the newest pairs."""

    def rank(self) -> None:
        """The prompt has ended: says in `mass` what its pairs are worth."""

    def worth(self) -> torch.Tensor:
        """`mass` of a whole prompt, without a bound where a pair must stay."""
        worth = self.mass.clone()
        worth[:, :, : self.sinks] = torch.inf
        worth[:, :, -self.recent :] = torch.inf
        return worth

    def bound(self, kept: torch.Tensor, capacity: torch.Tensor) -> None:
        """From now on a head holds at most `capacity` [B, G] pairs; first those in `kept`.

        Args:
            kept: bool [B, G, N].
        """
        total = kept.shape[-1]
        order = torch.where(kept, torch.arange(total, device=kept.device), total).sort().values
        order = order[..., : int(kept.sum(dim=-1).max())]
        index = order.clamp(max=total - 1)
        self.keys = self.keys.gather(2, _rows(index, self.keys))
        self.values = self.values.gather(2, _rows(index, self.values))
        self.mass = self.mass.gather(2, index)
        self.places = order.masked_fill(order == total, -1)
        self.capacity, self.widest = capacity, int(capacity.max())
        self.after = torch.full(kept.shape[:1], self.seen, device=kept.device)

    def widen(self, width: int) -> None:
        """Adds empty slots until there are `width`."""
        more = width - self.places.shape[-1]
        if more > 0:
            self.keys = functional.pad(self.keys, (0, 0, 0, more))
            self.values = functional.pad(self.values, (0, 0, 0, more))
            self.mass = functional.pad(self.mass, (0, more))
            self.places = functional.pad(self.places, (0, more), value=-1)

    def _replace(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Puts new pairs into empty slots, else into those of the pairs that are worth least."""
        new = keys.shape[2]
        self.widen(min(self.widest, -(-self.seen // GROWTH) * GROWTH))
        self.after += new
        oldest = (self.after - self.recent)[:, None, None]
        stays = (self.places >= oldest) | ((self.places >= 0) & (self.places < self.sinks))
        worth = self.mass.masked_fill(stays, torch.inf)
        worth = worth.masked_fill(self.places < 0, -torch.inf)
        slot = torch.arange(worth.shape[-1], device=worth.device)
        worth = worth.masked_fill(slot >= self.capacity[..., None], torch.inf)
        index = _least(worth, self.places, new)
        self.keys.scatter_(2, _rows(index, keys), keys)
        self.values.scatter_(2, _rows(index, values), values)
        self.mass.scatter_(2, index, torch.full_like(worth[..., :new], self.fresh))
        self.places.scatter_(2, index, self._newest(new)[:, None].expand_as(index))

    def _newest(self, count: int) -> torch.Tensor:
        """Positions of each row's last `count` tokens, [B, count]."""
        return self.after[:, None] - count + torch.arange(count, device=self.after.device)

    def visible(self, count: int) -> torch.Tensor:
        """Which slots each of the newest `count` tokens sees, bool [B, G, count, W]."""
        places = self.places[:, :, None]
        return (places >= 0) & (places <= self._newest(count)[:, None, :, None])

    def get_seq_length(self) -> int:
        """Tokens seen: what positions continue from."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As a growing cache; once there are slots, `visible` takes the place of this mask."""
        return self.seen + query_length, 0

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was."""
        super().reorder_cache(beam_idx)
        for name in ("mass", "places", "capacity", "after"):
            old = getattr(self, name)
            if old is not None:
                setattr(self, name, old.index_select(0, beam_idx.to(old.device)))


def _least(worth: torch.Tensor, places: torch.Tensor, count: int) -> torch.Tensor:
    """Indices [B, G, count] of the slots that are worth least; of equals those of oldest pairs.

    Pairs that left the window of a prompt shorter than the slots are equals: which of them goes
    must not depend on how wide the slots of other rows are.
    """
    if count == 1:
        equal = worth == worth.amin(dim=-1, keepdim=True)
        newest = torch.iinfo(places.dtype).max
        return places.masked_fill(~equal, newest).argmin(dim=-1, keepdim=True)
    oldest = places.argsort(dim=-1)
    order = worth.gather(-1, oldest).argsort(dim=-1, stable=True)
    return oldest.gather(-1, order[..., :count])


def _rows(index: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """`index` [B, G, n] for gathering whole rows of `tensor` [B, G, N, D]."""
    return index[..., None].expand(*index.shape, tensor.shape[-1])
