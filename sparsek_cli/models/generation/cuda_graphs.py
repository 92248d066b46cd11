"""A decoding step of a model over a SparseK cache, as one CUDA graph wherever one can be captured.

Slots never move and never change in number, so a step is the same launches on the same addresses at
any context: captured once, replayed for every token. Elsewhere (a CPU, hooks, several devices) the
same step runs eagerly.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from sparsek_kernels import dispatch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparsek_cli import quantised
from sparsek_cli.errors import SparsekError, first_line
from sparsek_cli.models.cache.slots import SparseKCache, SparseKCacheLayer

if TYPE_CHECKING:
    from sparsek_cli.models.generation.fused import FusedModules

_LOG = logging.getLogger("sparsek_cli")
_logged: set[str] = set()
# Graphs kept per model: each holds its rows' slots and one step's activations.
KEPT_GRAPHS = 2
_graphs: weakref.WeakKeyDictionary[nn.Module, list[Decoder]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


class Decoder:
    """Reads one token of every row per call, in place.

    Args:
        model: a causal LM with SparseK attention, in eval mode; held weakly.
        batch: number of rows B.
        pick: what follows in the same graph: logits [B, V] float32 -> the next tokens [B], which
            become `words`. It must only launch work, and keep its tensors where they are.
        compiled: torch.compile's options if it shall fuse the step (the first one then takes
            long), see `compile_options`.

    Attributes:
        words: [B] int64, the tokens that the next `step` reads.
        logits: [B, V] float32 after the last `step`; the next one may overwrite them.
        eager: why steps are not a graph, None while they are or will be.
        fused: the modules that own kernels replace in a graph, see `fused`; None: none.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: int,
        *,
        pick: Callable[[torch.Tensor], torch.Tensor] | None = None,
        compiled: tuple[tuple[str, Any], ...] | None = None,
    ):
        self._model = weakref.ref(model)
        self.pick = pick
        self.compiled = compiled
        self.batch = batch
        self.words = torch.zeros(batch, dtype=torch.int64, device=model.device)
        self.logits: torch.Tensor | None = None
        self.eager: str | None = None
        self.signature: tuple[Any, ...] | None = None
        self.fused: FusedModules | None = None
        self._failed: str | None = None
        self._positions = torch.zeros_like(self.words)
        self._advance = torch.ones_like(self.words)
        self._states: list[Any] | None = None
        self._cache: SparseKCache | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._steps = 0
        self._warm = False

    @contextmanager
    def over(
        self,
        cache: SparseKCache,
        positions: torch.Tensor,
        *,
        advance: torch.Tensor | None = None,
        keep: bool = True,
        own: bool = False,
    ) -> Iterator[Decoder]:
        """Within the block, `step` continues `cache`, whose next tokens stand at `positions` [B].

        Args:
            advance: int64 [B], 0 where a row's position stays; all advance by 1 unless given.
            keep: whether the cache is used afterwards; if not, it ends up empty.
            own: whether this decoder serves no other cache, which then stays where it is.
        """
        self._begin(cache, positions)
        if advance is None:
            self._advance.fill_(1)
        else:
            self._advance.copy_(advance)
        try:
            yield self
        finally:
            self._end(keep, own)

    def step(self) -> None:
        """Reads `words`; then `logits` are those of what follows (and `words`, with a `pick`)."""
        if self.eager is not None or not self._warm:
            self._run()
            self._warm = True
        elif self._graph is None:
            self._capture()
        else:
            self._graph.replay()
        self._steps += 1

    def read(self, words: torch.Tensor) -> torch.Tensor:
        """Logits [B, V] after `words` [B]: a `step` that reads these."""
        self.words.copy_(words)
        self.step()
        return self.logits

    def _begin(self, cache: SparseKCache, positions: torch.Tensor) -> None:
        if self._cache is not None:
            raise SparsekError("this decoder is at work on another cache", hint="make a second one")
        if cache.batch_size != self.batch:
            raise SparsekError(
                f"the cache holds {cache.batch_size} sequences, the decoder takes {self.batch}",
                hint="make a decoder for that batch",
            )
        self.eager = self._failed or why_eager(self._model(), cache)
        self._positions.copy_(positions)
        if self.eager is None:
            self._adopt(cache)
            self._fuse()
        self._cache, self._steps = cache, 0
        for layer in cache.layers:
            layer.stepping = True

    def _fuse(self) -> None:
        model = self._model()
        if self.fused is None and self.compiled is None and getattr(model, "fused_steps", False):
            from sparsek_cli.models.generation.fused import FusedModules

            self.fused = FusedModules(model, self.batch)

    def _adopt(self, cache: SparseKCache) -> None:
        """Moves the cache's slots to where the graph expects them."""
        if self._states is None:
            self._states = [layer.state.clone() for layer in cache.layers]
        for layer, own in zip(cache.layers, self._states, strict=True):
            if own.layout != layer.state.layout or own.keys.dtype != layer.state.keys.dtype:
                raise SparsekError(
                    "the cache's slots are not those this decoder was made for",
                    hint="make a new decoder after changing the budget or dtype",
                )
            if layer.state is not own:
                own.copy_(layer.state)
                layer.state = own

    def _end(self, keep: bool, own: bool) -> None:
        cache, self._cache = self._cache, None
        for layer in cache.layers:
            layer.stepping = False
            layer.tokens_seen += self._steps
            if self.eager is None and not own:
                layer.state = layer.state.clone() if keep else None

    @torch.no_grad()
    def _run(self) -> None:
        with nullcontext() if self.fused is None else self.fused.installed():
            self._forward()

    def _forward(self) -> None:
        model = self._model()
        kind = type(model)
        forward = kind.__call__ if self.compiled is None else _compiled(kind, self.compiled)
        output = forward(
            model,
            input_ids=self.words[:, None],
            position_ids=self._positions[:, None],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
            return_dict=True,
        )
        self.logits = output.logits[:, -1].float()
        self._positions.add_(self._advance)
        if self.pick is not None:
            self.words.copy_(self.pick(self.logits))

    def _capture(self) -> None:
        """Captures a step, which does not run it, and replays it once; eager where it fails."""
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may use the device meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._run()
        except RuntimeError as error:
            self._failed = self.eager = first_line(error)
            _say(f"decoding runs eagerly, the step cannot be captured: {self.eager}")
            self._run()
            return
        self._graph = graph
        graph.replay()


def why_eager(model: nn.Module, cache: SparseKCache) -> str | None:
    """Why a decoding step cannot be a CUDA graph, logged once for each reason; None if it can."""
    if not _has_graphs(model.device):
        return f"device {model.device.type}"
    reason = _obstacle(model, cache)
    if reason is not None:
        _say(f"decoding runs eagerly, without a CUDA graph: {reason}")
    return reason


def _obstacle(model: nn.Module, cache: SparseKCache) -> str | None:
    if not all(isinstance(layer, SparseKCacheLayer) for layer in cache.layers):
        return "some layers have a cache of another kind"
    gates = {layer.budget.gate for layer in cache.layers} - {"straight_through"}
    if gates:
        return f"gate {gates.pop()!r} keeps a list that grows"
    backend, why = dispatch.explain(model.device, model.dtype)
    if backend != "triton":
        return f"attention runs on the {backend} backend: {why}"
    if quantised.stays_packed(model.config):
        return "packed weights are computed with by another library"
    if model.training:
        return "the model is in training mode"
    if torch.is_autocast_enabled("cuda"):
        return "autocast is on"
    if torch.cuda.is_current_stream_capturing():
        return "another graph is being captured"
    if len({tensor.device for tensor in _tensors(model)}) > 1:
        return "the weights are on several devices"
    for module in model.modules():
        if module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"):
            return f"{type(module).__name__} has hooks, which a graph would not call"
    return None


def _has_graphs(device: torch.device) -> bool:
    return device.type == "cuda"


def _say(message: str) -> None:
    if message not in _logged:
        _logged.add(message)
        _LOG.info(message)


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()


@contextmanager
def decoder_for(
    model: nn.Module,
    batch: int,
    *,
    pick: Any = None,
    compiled: tuple[tuple[str, Any], ...] | None = None,
) -> Iterator[Decoder]:
    """A decoder for the block: one that an earlier call left, if the model is what it was then.

    Args:
        pick: as in `Decoder`, with a hashable `signature`: equal ones can stand for each other.
    """
    if not _has_graphs(model.device):
        yield Decoder(model, batch, pick=pick, compiled=compiled)
        return
    mode = torch.is_inference_mode_enabled()  # tensors made in it cannot be written outside of it
    signature = (batch, compiled, mode, getattr(pick, "signature", None), _fingerprint(model))
    with _lock:
        kept = _graphs.setdefault(model, [])
        found = next((one for one in kept if one.signature == signature), None)
        if found is not None:
            kept.remove(found)  # nobody else may use its buffers meanwhile
    decoder = found or Decoder(model, batch, pick=pick, compiled=compiled)
    decoder.signature = signature
    yield decoder  # after an error its buffers are not trusted: it is not put back
    if decoder._graph is not None:
        with _lock:
            kept.insert(0, decoder)
            del kept[KEPT_GRAPHS:]


def _fingerprint(model: nn.Module) -> tuple[Any, ...]:
    """All that a captured step depends on: where the weights are, and every module's settings.

    A replay does not look at Python: a scorer put in another's place, an adapter switched off or a
    changed budget must not meet a graph that was captured before.
    """
    config = model.config
    found: list[Any] = [config._attn_implementation, repr(config.sparsek)]
    found.append(id(ALL_ATTENTION_FUNCTIONS[config._attn_implementation]))
    for module in model.modules():
        found.append((id(type(module)), id(module)))
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers"):
                found += [(key, _where(tensor)) for key, tensor in value.items()]
            else:
                found += _settings(name, value)
    return tuple(found)


def _where(tensor: torch.Tensor | None) -> tuple[Any, ...] | None:
    return None if tensor is None else (tensor.data_ptr(), tensor.shape, tensor.dtype)


_PLAIN = (bool, int, float, str, type(None), torch.dtype)


def _settings(name: str, value: Any) -> list[Any]:
    """Plain values, functions, and containers of plain values."""
    if isinstance(value, _PLAIN):
        return [(name, value)]
    if isinstance(value, dict):
        return [(name, key, item) for key, item in value.items() if isinstance(item, _PLAIN)]
    if isinstance(value, (list, tuple, set)):
        return [(name, *(item for item in value if isinstance(item, _PLAIN)))]
    return [(name, id(value))] if callable(value) else []


# Graphs are captured here, so torch.compile must not make its own.
_WITHOUT_GRAPHS = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}


def compile_options(config: Any) -> tuple[tuple[str, Any], ...] | None:
    """What torch.compile is given for a generation config that has a `compile_config`."""
    if config.compile_config is None or config.disable_compile:
        return None
    asked = config.compile_config.to_dict()
    mode = asked.get("mode")
    options = {"mode": _WITHOUT_GRAPHS.get(mode, mode), "backend": asked.get("backend")}
    return tuple((name, value) for name, value in options.items() if value is not None)


_compiled_calls: dict[tuple[type, Any], Callable] = {}


def _compiled(kind: type, options: tuple[tuple[str, Any], ...]) -> Callable:
    """The forward of a model class under torch.compile; its guards tell models apart."""
    if (kind, options) not in _compiled_calls:
        compiled = torch.compile(kind.forward, dynamic=False, **dict(options))
        _compiled_calls[kind, options] = compiled
    return _compiled_calls[kind, options]
