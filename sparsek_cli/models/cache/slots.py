"""A transformers cache that never grows: sinks, selected pairs and the window of every layer.

Layers without SparseK attention have transformers' own kinds, which are bounded too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    get_layer_types_and_kwargs,
)

from sparsek_cli.errors import UsageError
from sparsek_cli.families.by_layer import shared_layers
from sparsek_cli.families.layers import has_states
from sparsek_cli.models.cache.bytes import check_fits, pair_bytes, state_bytes
from sparsek_cli.models.cache.layers import SparseKCacheLayer, StateAndSparseKLayer
from sparsek_cli.models.config import (
    layer_budget,
    sparse_layers,
)


def cache_layers(config: Any, make: Callable[[int], Any] | None = None) -> list[Any]:
    """A cache layer for each layer of a converted model, of the kind that it needs.

    Args:
        make: what layers with SparseK attention get instead of slots, by the layer's number.

    Raises:
        UsageError: `make`, for layers that keep a state beside their attention, or whose keys
            other layers read.
    """
    sparse = set(sparse_layers(config))
    given, make = make, make or (lambda layer: SparseKCacheLayer(layer_budget(config, layer)))
    if len(sparse) == config.num_hidden_layers and not has_states(
        getattr(config, "layer_types", None)
    ):
        return [make(layer) for layer in sorted(sparse)]
    if given is not None and "hybrid" in config.layer_types:
        raise UsageError(
            f"{config.model_type.removeprefix('sparsek_')} keeps a state beside each layer's keys",
            hint="compare with dense, window and random, which SparseK's own cache can stand for",
        )
    if given is not None and shared_layers(config):
        raise UsageError(
            f"layers of {config.model_type.removeprefix('sparsek_')} read keys of other layers "
            "(num_kv_shared_layers), whose queries this baseline does not count",
            hint="compare with dense, window and random, which SparseK's own cache can stand for",
        )
    kinds, options = get_layer_types_and_kwargs(config)
    if isinstance(options, dict):  # transformers 5.17: the same for all layers
        options = [options] * len(kinds)
    layers: list[Any] = []
    for layer, (kind, own) in enumerate(zip(kinds, options, strict=True)):
        if layer not in sparse:
            layers.append(DYNAMIC_LAYER_TYPE_MAPPING[kind](**own))
        elif kind == "hybrid":
            layers.append(StateAndSparseKLayer(budget=layer_budget(config, layer), **own))
        else:
            layers.append(make(layer))
    return layers


class SparseKCache(Cache):
    """The cache of a converted model: sinks + topk + window pairs per KV head, at any length.

    `generate` and `forward(use_cache=True)` make one by themselves; make it by hand to keep it
    between calls (prefill in chunks, several turns).

    Args:
        config: a `sparsek_<type>` config; its budget at this moment is the cache's for good.

    Raises:
        UsageError: slots for one sequence fit neither into the GPUs' memory nor into the host's.

    Attributes:
        given: False for one that `generate` made and nobody else will see.
    """

    given = True

    def __init__(self, config: Any):
        check_fits(config)
        super().__init__(layers=cache_layers(config))

    @property
    def all_slots(self) -> bool:
        """Whether every layer has SparseK attention and nothing else: no window, no state."""
        return all(type(layer) is SparseKCacheLayer for layer in self.layers)

    @property
    def max_cache_len(self) -> int:
        """-1: texts of any length. PEFT's prefix tuning asks, before it is refused."""
        return -1

    @property
    def nbytes(self) -> int:
        """Bytes held now, over all layers: 0 before the first token, then constant.

        Layers that slide grow until their window is full.
        """
        return sum(
            layer.nbytes
            if isinstance(layer, SparseKCacheLayer)
            else pair_bytes(layer) + state_bytes(layer)
            for layer in self.layers
        )

    @property
    def slot_bytes(self) -> int:
        """Bytes of the slots among them: what SparseK bounds."""
        own = (layer for layer in self.layers if isinstance(layer, SparseKCacheLayer))
        return sum(layer.nbytes - state_bytes(layer) for layer in own)

    @property
    def state_bytes(self) -> int:
        """Bytes of the states among them, of layers that keep one."""
        return sum(state_bytes(layer) for layer in self.layers)

    @property
    def batch_size(self) -> int:
        """Sequences held, or -1 before the first token."""
        states = (x.state for x in self.layers if isinstance(x, SparseKCacheLayer))
        state = next(states, None)
        return -1 if state is None else state.batch
