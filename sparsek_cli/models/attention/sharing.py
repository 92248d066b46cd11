"""Layers without keys of their own: they attend, with their own queries, to what another one keeps.

transformers hands keys and values of a pass from the layer that stores them to those that read
them, in a dictionary of that pass (`shared_kv_states`). What SparseK's attention needs beyond them
goes the same way: scores, slopes, and the state that the pass found. So a reading layer selects
what the storing one selects, sees what it sees, and puts nothing into a cache. Stand-ins belong to
scorers: a reading layer has none.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sparsek_kernels import SparseKState, attend_to_state, sparsek_attention

from sparsek_cli.errors import SparsekError
from sparsek_cli.models.cache.layers import SparseKCacheLayer
from sparsek_cli.models.cache.slots import SparseKCache
from sparsek_cli.models.config import ATTENTION, GATES

_KEY = "sparsek"  # in the dictionary, beside kinds of layers


@dataclass
class Stored:
    """What one layer hands to those that read its keys, for one pass.

    Attributes:
        layer: its number.
        scores: [B, G, N] float32. slopes: [G].
        cache: its slots; None where the pass has no cache.
        before: its state before the pass; None where that held nothing.
        stepped: the pass is one token, which the state holds by now: `before` is not kept.
    """

    layer: int
    scores: torch.Tensor
    slopes: torch.Tensor
    cache: SparseKCacheLayer | None
    before: SparseKState | None = None
    stepped: bool = False

    def to(self, device: torch.device, non_blocking: bool = False) -> Stored:
        """On another device, as accelerate moves what goes from layer to layer."""
        before = None if self.before is None else self.before.to(device)
        scores, slopes = (
            x.to(device, non_blocking=non_blocking) for x in (self.scores, self.slopes)
        )
        return Stored(self.layer, scores, slopes, self.cache, before, self.stepped)

    def keep_state(self, *, steps: bool) -> None:
        """Before the storing layer attends, which consumes its state.

        Args:
            steps: one token is put in place, so that the state afterwards is what it sees.
        """
        self.stepped = steps
        if self.cache is not None and not self.cache.fresh and not steps:
            self.before = self.cache.state.clone()

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scores: torch.Tensor,
        settings: Mapping[str, Any],
    ) -> torch.Tensor:
        """Attention of a reading layer; the state stays as the storing layer left it.

        Args:
            query: [B, H, N, D], or the last one alone. key, value: [B, G, N, D], of the pass.
            scores: [B, G, N].
            settings: of `sparsek_attention`.

        Returns:
            As query.
        """
        if self.stepped or query.shape[2] < key.shape[2]:  # the last token alone, see `last_token`
            names = ("scale", "softcap", "sink_logits")
            state = self.cache.state.to(query.device)
            return attend_to_state(query, state, **{name: settings[name] for name in names})
        if self.before is None:
            return sparsek_attention(query, key, value, scores, **settings)
        # A copy: it is consumed, and others may read it after this layer.
        return sparsek_attention(query, key, value, scores, state=self.before.clone(), **settings)[
            0
        ]


class ReadingAttentionMixin:
    """Put in front of the attention class of a layer that reads another one's keys."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any):
        """As the family's attention; hidden_states [B, N, hidden_size]."""
        if self.config._attn_implementation == ATTENTION:
            stored = take(kwargs["shared_kv_states"])
            kwargs["sparsek_scores"], kwargs["sparsek_slopes"] = stored.scores, stored.slopes
            kwargs["sparsek_reads"] = stored
        return super().forward(hidden_states, *args, **kwargs)


def layer_of_scores(module: Any, arguments: Mapping[str, Any]) -> int:
    """The layer by whose scores and budget an attention module attends: its own, or another.

    Args:
        arguments: keyword arguments of its attention function.
    """
    stored = arguments.get("sparsek_reads")
    return module.layer_idx if stored is None else stored.layer


def hand_on(shared: MutableMapping[str, Any], stored: Stored) -> None:
    """Puts what a layer stores where the layers that read its keys look for them."""
    shared[_KEY] = (stored,)


def take(shared: Mapping[str, Any]) -> Stored:
    """What `hand_on` put there.

    Raises:
        SparsekError: nothing: the layer that stores did not run in this pass.
    """
    if _KEY not in shared:
        raise SparsekError(
            "a layer reads the keys of an earlier one, which did not run before it",
            hint="run all layers of the model in one pass",
        )
    return shared[_KEY][0]


def reads_slots(config: Any, cache: Any, inputs: Sequence[Any]) -> bool:
    """Whether the last token of a pass sees what the cache holds after it, in every row.

    Args:
        inputs: as `last_token` takes them.
    """
    held = isinstance(cache, SparseKCache) and config.sparsek["gate"] == GATES[0]
    mask = inputs[-1]["full_attention"]
    ends = mask is None or bool(mask[:, -1].all())
    return held and ends and not torch.is_grad_enabled()


def last_token(inputs: Sequence[Any]) -> tuple[Any, ...]:
    """What a pass hands to its last layers, of its last token.

    Args:
        inputs: tensors [B, N, ...], or none; rotary factors [B, N, D] by kind of layer, and masks:
            [B, N] of layers that attend to everything, [B, 1, N, M] of those that slide.
    """
    *tensors, turns, masks = inputs
    return (
        *(x if x is None else x[:, -1:] for x in tensors),
        {kind: tuple(part[:, -1:] for part in pair) for kind, pair in turns.items()},
        {
            kind: None if mask is None or mask.dim() == 2 else mask[:, :, -1:]
            for kind, mask in masks.items()
        },
    )
