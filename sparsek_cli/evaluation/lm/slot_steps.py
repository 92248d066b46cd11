"""Decoding steps over caches whose slots never move, as one CUDA graph where there is a GPU.

Rivals have such slots once a prompt has ended; dense caches get them here, with room for the
answer. A small model is otherwise bound by its launches: hundreds for every token.
"""

import logging
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from sparsek_cli.evaluation.lm.batching import Joined
from sparsek_cli.evaluation.policies.evicting_layer import GROWTH, EvictingLayer
from sparsek_cli.models import DENSE_ATTENTION, FAMILIES

_LOG = logging.getLogger("sparsek_cli")


class SlotSteps:
    """Reads one token of every row per call: the first one eagerly, the others as a graph.

    Args:
        cache: of layers with slots for all tokens to come; changed in place.
        positions: of each row's next token, int64 [B].
    """

    def __init__(self, model: Any, cache: Cache, positions: torch.Tensor):
        self._model, self._cache = model, cache
        self._words, self._positions = torch.zeros_like(positions), positions.clone()
        self._logits: torch.Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._eager = positions.device.type != "cuda"
        self._warm = False

    @torch.no_grad()
    def read(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [B, 1, V] after `tokens` [B]; the next call may overwrite them."""
        self._words.copy_(tokens)
        if self._graph is not None:
            self._graph.replay()
        elif self._eager or not self._warm:
            self._run()
        else:
            self._capture()
        self._warm = True
        return self._logits

    def _run(self) -> None:
        self._logits = self._model(
            input_ids=self._words[:, None],
            position_ids=self._positions[:, None],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        self._positions.add_(1)

    def _capture(self) -> None:
        """Captures a step, which does not run it, and replays it once; eager where it fails."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._run()
        except RuntimeError as error:
            self._eager = True
            _LOG.info("answers are decoded eagerly: %s", (str(error).splitlines() or [""])[0])
            self._run()
            return
        self._graph = graph
        graph.replay()


def in_slots(model: Any, cache: Any, joined: Joined | None, room: int) -> Cache | None:
    """`cache` in slots that take `room` more tokens without moving.

    Args:
        joined: where its rows stand, if they may differ in length.

    Returns:
        None for a kind of cache that has none. Rivals' caches are changed in place; of a dense one,
        whose layers are let go one by one, comes a new one.
    """
    layers = cache.layers
    if all(isinstance(layer, EvictingLayer) and layer.bounded for layer in layers):
        for layer in layers:
            layer.widen(min(layer.widest, _rounded(layer.seen + room)))
        return cache
    # Other families may attend by a function of their own, which does not ask what slots hold.
    own = model.config._attn_implementation == "sdpa" and model.config.model_type in FAMILIES
    attends = own or model.config._attn_implementation == DENSE_ATTENTION
    if not attends or not all(type(layer) is DynamicLayer for layer in layers):
        return None
    longest = layers[0].keys.shape[2]
    after = torch.full(layers[0].keys.shape[:1], longest, device=layers[0].keys.device)
    if joined is not None:
        after = joined.positions.clone()
    # Shorter rows are padded on the left: their first places are below 0, which means empty.
    places = torch.arange(longest, device=after.device) - (longest - after)[:, None]
    whole = Cache(layers=[])
    for number, layer in enumerate(layers):
        whole.layers.append(_whole(layer, places.clamp(min=-1), after, _rounded(longest + room)))
        layers[number] = None
    return whole


def _rounded(count: int) -> int:
    return -(-count // GROWTH) * GROWTH


def _whole(layer: DynamicLayer, places: torch.Tensor, after: torch.Tensor, width: int) -> Any:
    """A dense layer's pairs in `width` slots, of which none is ever given away."""
    new = EvictingLayer(width, recent=width)
    new.keys, new.values = layer.keys, layer.values
    new.dtype, new.device, new.is_initialized = layer.keys.dtype, layer.keys.device, True
    batch, heads, longest, _ = layer.keys.shape
    new.places = places[:, None].expand(batch, heads, longest)
    new.mass = torch.zeros(batch, heads, longest, device=places.device)
    new.capacity = torch.full((batch, heads), width, device=places.device)
    new.after, new.seen, new.widest = after.clone(), longest, width
    new.widen(width)
    return new
