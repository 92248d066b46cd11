"""A layer of the cache: its slots, alone or beside the state of a state-space block."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from sparsek_kernels import SparseKState
from transformers.cache_utils import CacheLayerMixin, LinearAttentionLayer

from sparsek_cli.errors import SparsekError
from sparsek_cli.models.cache.bytes import slot_dtype, state_bytes
from sparsek_cli.models.config import LayerBudget


class SparseKCacheLayer(CacheLayerMixin):
    """One layer's state, in the shape transformers expects of a cache layer.

    Scores are not known where transformers calls `update`, so `update` only counts tokens and
    hands the new keys and values back; the attention function reads `state` and puts the advanced
    one in its place. A state is consumed when it is advanced: copy.deepcopy a cache to keep it.

    Attributes:
        fresh: the tokens counted last are the first ones of all rows.
        stepping: while a `Decoder` writes into the slots it counts the tokens itself, as a replayed
            graph runs no Python, and every step must look like the one before.
    """

    is_compileable = False
    is_sliding = False
    is_croppable = False
    supports_early_init = True
    fresh = False
    stepping = False

    def __init__(self, budget: LayerBudget):
        # Not calling the base initializer: `keys` and `values` are views of the state here.
        self.budget = budget
        self.tokens_seen = 0
        self._state: SparseKState | None = None
        self._empty: Callable[..., SparseKState] | None = None  # until somebody asks for the state

    @property
    def state(self) -> SparseKState | None:
        """The slots; None before the first token."""
        if self._empty is not None:
            self.state = self._empty()
        return self._state

    @state.setter
    def state(self, state: SparseKState | None) -> None:
        self._state, self._empty = state, None

    def state_to_read(self) -> SparseKState:
        """The state for a call of `sparsek_attention` that is told whether the layer is `fresh`.

        What is fresh is filled by that call, so that nobody has to make zeros of it before. It is
        the layer's only when that call has filled it: set `state` then.
        """
        return self._empty(filled=False) if self.fresh and self._empty is not None else self.state

    @property
    def is_initialized(self) -> bool:
        return self._state is not None or self._empty is not None

    @property
    def keys(self) -> torch.Tensor | None:
        """Kept keys [B, slots of all KV heads, D], or None before the first token."""
        return None if self.state is None else self.state.keys

    @property
    def values(self) -> torch.Tensor | None:
        """Kept values, as `keys`."""
        return None if self.state is None else self.state.values

    @property
    def nbytes(self) -> int:
        """Bytes of everything this layer holds."""
        return 0 if self.state is None else self.state.nbytes

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Slots for keys [B, G, N, D]; their number never changes afterwards."""
        batch, heads, _, size = key_states.shape
        device = key_states.device.type
        # Under autocast attention gets keys in its dtype, also from projections in float32.
        casting = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if casting else key_states.dtype
        self._empty = partial(
            SparseKState.empty,
            batch,
            heads,
            size,
            topk=self.budget.topk,
            window=self.budget.window,
            sinks=self.budget.sinks,
            dtype=slot_dtype(self.budget, dtype),
            device=key_states.device,
        )

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Count the new tokens and return their keys and values [B, G, N, D] unchanged."""
        if self._state is None:
            self.lazy_initialization(key_states, value_states)
        elif self._state.batch != key_states.shape[0]:
            raise SparsekError(
                f"the cache holds {self._state.batch} sequences, the input has "
                f"{key_states.shape[0]}",
                hint="start a new cache, or call batch_repeat_interleave on this one",
            )
        self.fresh = not self.stepping and self.tokens_seen == 0
        if not self.stepping:
            self.tokens_seen += key_states.shape[-2]
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Tokens this layer has seen, padding included: what position_ids continue from."""
        return self.tokens_seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Physical keys a query of `query_length` tokens meets, and how many came before them."""
        topk = self.budget.topk
        slots = (
            self.budget.sinks + self.budget.window + (topk if isinstance(topk, int) else max(topk))
        )
        held = slots if self.stepping else min(self.tokens_seen, slots)
        return held + query_length, 0 if self.stepping else self.tokens_seen - held

    def get_max_length(self) -> int:
        """No limit: any number of tokens may be fed."""
        return -1

    def reset(self) -> None:
        """Forget everything; the next update allocates anew."""
        self.state = None
        self.tokens_seen = 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row i becomes what row `beam_idx[i]` was."""
        if self.state is not None:
            self.state = self.state.index_select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, copies side by side."""
        if self.state is not None:
            rows = torch.arange(self.state.batch, device=self.state.keys.device)
            self.state = self.state.index_select(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only these rows."""
        if self.state is not None:
            device = self.state.keys.device
            rows = torch.arange(self.state.batch, device=device)
            self.state = self.state.index_select(rows[indices.to(device)])

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: pairs that were evicted cannot come back.

        Raises:
            SparsekError: unless there is nothing to remove.
        """
        if tokens_to_remove != 0:
            raise SparsekError(
                "a SparseK cache cannot be cropped: evicted pairs are gone",
                hint="copy the cache (copy.deepcopy) before the tokens you may want to take back; "
                "assisted and contrastive decoding need a croppable cache and are not supported",
            )

    def activate_past_recording(self) -> None:
        """Refused: called where tokens will be taken back (see `crop`)."""
        self.crop(-1)

    def offload(self) -> None:
        """Nothing to do: the layer is small and stays where it is."""

    def prefetch(self) -> None:
        """Nothing to do, see `offload`."""


class StateAndSparseKLayer(LinearAttentionLayer, SparseKCacheLayer):
    """A layer with both a state-space block and SparseK attention (Falcon-H1)."""

    def __init__(self, number_of_states: int = 1, **kwargs: Any):
        SparseKCacheLayer.__init__(self, **kwargs)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """For keys and values where they are given, for states otherwise."""
        of = SparseKCacheLayer if args else LinearAttentionLayer
        of.lazy_initialization(self, *args, **kwargs)

    @property
    def nbytes(self) -> int:
        """Bytes of slots and states."""
        return super().nbytes + state_bytes(self)

    def reset(self) -> None:
        SparseKCacheLayer.reset(self)
        LinearAttentionLayer.reset(self)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        SparseKCacheLayer.reorder_cache(self, beam_idx)
        LinearAttentionLayer.reorder_cache(self, beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        SparseKCacheLayer.crop(self, tokens_to_remove)

    def activate_past_recording(self) -> None:
        SparseKCacheLayer.activate_past_recording(self)

    def offload(self) -> None:
        """Nothing to do, as in `SparseKCacheLayer`."""

    def prefetch(self) -> None:
        """Nothing to do, as in `SparseKCacheLayer`."""
