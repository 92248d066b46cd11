"""Runs the dense base one layer at a time and records what its attention sees.

The residual stream of all sequences is kept; every layer is visited once, so that whatever is
measured there needs memory for one layer only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sparsek_cli.conversion.loading import quiet_transformers
from sparsek_cli.conversion.plan import Plan

_RECORDING = "sparsek_recording"


@dataclass(frozen=True)
class Recorded:
    """One sequence in one layer.

    Attributes:
        inputs: [N, hidden], what the attention block (and so the scorer) reads.
        query: [H, N, D]; key, value: [G, N, D], positions already encoded.
        scaling: factor of the logits.
    """

    inputs: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scaling: float


class _Stop(Exception):
    """Ends a forward pass once all that is wanted of it is known."""


class LayerwiseBase:
    """The dense base as a stack of layers over a batch of sequences.

    Args:
        plan: which checkpoint.
        sequences: token ids [N] each; lengths may differ.
        device: where layers run. dtype: their number format.

    Attributes:
        hidden: per sequence the input [1, N, hidden] of the next layer.
    """

    def __init__(
        self, plan: Plan, sequences: list[torch.Tensor], device: torch.device, dtype: torch.dtype
    ):
        AttentionInterface.register(_RECORDING, self._attend)
        AttentionMaskInterface.register(_RECORDING, lambda *args, **kwargs: None)
        self._last: tuple[torch.Tensor, ...] | None = None
        self._inputs: torch.Tensor | None = None
        self._to_the_end = True
        self._attention_name = plan.layout.attention
        with quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(
                plan.base.path, dtype=dtype, attn_implementation=_RECORDING
            )
        self._base = model.base_model.eval().to(device)
        self._layers = self._base.get_submodule(plan.layout.layers)
        self.hidden: list[torch.Tensor] = []
        self._arguments: list[tuple[tuple, dict]] = []
        self._embed(sequences, device)

    def _attend(self, module, query, key, value, attention_mask, scaling=None, **kwargs):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        self._last = (query[0], key[0], value[0], scale)
        if not self._to_the_end:
            raise _Stop
        kwargs.pop("sliding_window", None)
        return sdpa_attention_forward(
            module, query, key, value, None, scaling=scale, is_causal=True, **kwargs
        )

    def _embed(self, sequences: list[torch.Tensor], device: torch.device) -> None:
        def keep(module, args, kwargs):
            states, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
            self.hidden.append(states)
            self._arguments.append((rest, kwargs))
            raise _Stop

        handle = self._layers[0].register_forward_pre_hook(keep, with_kwargs=True)
        try:
            for ids in sequences:
                try:
                    self._base(input_ids=ids[None].to(device), use_cache=False)
                except _Stop:
                    continue
        finally:
            handle.remove()

    @contextmanager
    def _recording(self, attention: torch.nn.Module) -> Iterator[None]:
        def keep(module, args, kwargs):
            self._inputs = (args[0] if args else kwargs["hidden_states"])[0]

        handle = attention.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def output_weight(self, layer: int) -> torch.Tensor:
        """W_o of a layer as [H * D, hidden], float32."""
        attention = self._layers[layer].get_submodule(self._attention_name)
        for name in ("o_proj", "dense", "c_proj"):
            projection = getattr(attention, name, None)
            if projection is not None:
                weight = projection.weight.detach().float()
                # GPT-2's Conv1D keeps its weight transposed.
                return weight.T if isinstance(projection, torch.nn.Linear) else weight
        raise AttributeError(f"{type(attention).__name__} has no known output projection")

    def run_layer(
        self, layer: int, numbers: range, use: Callable[[int, Recorded], None], *, advance: bool
    ) -> None:
        """Runs one layer over the sequences `numbers` and hands each recording to `use`.

        With `advance` their residual streams become the layer's output. Without it, and in the last
        layer, dense attention is left out: nothing needs its result, and it is most of the work.
        """
        block = self._layers[layer]
        self._to_the_end = advance and layer + 1 < self.layers
        with self._recording(block.get_submodule(self._attention_name)):
            for number in numbers:
                rest, kwargs = self._arguments[number]
                try:
                    output = block(self.hidden[number], *rest, **kwargs)
                except _Stop:
                    output = None
                query, key, value, scale = self._last
                use(number, Recorded(self._inputs, query, key, value, scale))
                if output is not None:
                    self.hidden[number] = output[0] if isinstance(output, tuple) else output
        self._last = self._inputs = None

    @property
    def layers(self) -> int:
        return len(self._layers)

