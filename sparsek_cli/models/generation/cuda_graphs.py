"""A decoding step of a model over a SparseK cache, as one CUDA graph wherever one can be captured.

Slots never move and never change in number, so a step is the same launches on the same addresses at
any context: captured once, replayed for every token. Elsewhere (a CPU, hooks, several devices) the
same step runs eagerly.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sparsek_cli.errors import SparsekError, first_line
from sparsek_cli.models.cache.slots import SparseKCache
from sparsek_cli.models.generation.compiled import compiled_forward
from sparsek_cli.models.generation.why_eager import say_once, why_eager

if TYPE_CHECKING:
    from sparsek_cli.models.generation.fused.modules import FusedModules


class Decoder:
    """Reads one token of every row per call, in place.

    Args:
        model: a causal LM with SparseK attention, in eval mode; held weakly.
        batch: number of rows B.
        pick: what follows in the same graph: logits [B, V], of the model's dtype -> the next tokens
            [B], which become `words`. It must only launch work, and leave its tensors in place.
        compiled: torch.compile's options if it shall fuse the step (the first one then takes
            long), see `compile_options`.

    Attributes:
        words: [B] int64, the tokens that the next `step` reads.
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
        self._logits: torch.Tensor | None = None
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

    @property
    def logits(self) -> torch.Tensor | None:
        """[B, V] float32 after the last `step`; the next one may overwrite them."""
        return None if self._logits is None else self._logits.float()

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
            from sparsek_cli.models.generation.fused.modules import FusedModules

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
        forward = kind.__call__ if self.compiled is None else compiled_forward(kind, self.compiled)
        output = forward(
            model,
            input_ids=self.words[:, None],
            position_ids=self._positions[:, None],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
            return_dict=True,
        )
        self._logits = output.logits[:, -1]
        self._positions.add_(self._advance)
        if self.pick is not None:
            self.words.copy_(self.pick(self._logits))

    def _capture(self) -> None:
        """Captures a step, which does not run it, and replays it once; eager where it fails."""
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may use the device meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._run()
        except RuntimeError as error:
            self._failed = self.eager = first_line(error)
            say_once(f"decoding runs eagerly, the step cannot be captured: {self.eager}")
            self._run()
            return
        self._graph = graph
        graph.replay()
