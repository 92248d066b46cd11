"""Runs the dense base one layer at a time and records what its attention sees.

The residual stream of all sequences is kept; every layer is visited once, so that whatever is
measured there needs memory for one layer only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface

from sparsek_cli import quantised
from sparsek_cli.conversion.calibrate.predictions import Predictions
from sparsek_cli.conversion.calibrate.recorded import (
    Attend,
    Reader,
    Recorded,
    dense_attention,
    sliding,
)
from sparsek_cli.conversion.planned import Plan
from sparsek_cli.loading import load_weights
from sparsek_cli.models.attention.arguments import check_arguments
from sparsek_cli.models.logits import Logits
from sparsek_cli.models.output import output_layer
from sparsek_cli.quantised.weights import weight_of

_RECORDING = "sparsek_recording"


class _Stop(Exception):
    """Ends a forward pass once all that is wanted of it is known."""


class LayerwiseBase:
    """The dense base as a stack of layers over a batch of sequences.

    Args:
        plan: which checkpoint.
        sequences: token ids [N] each; lengths may differ.
        turns: of each sequence, how many turns there are at its end and their length.
        device: where layers run. dtype: their number format.
        room: bytes of layers' outputs that may be kept, see `run_dense`.

    Attributes:
        hidden: per sequence the input [1, N, hidden] of the next layer; None after `take`. Of
            `Row.streams` [states, 1, N, hidden], here and wherever states go from layer to layer.
        logits: how weights are made in the layer that was run last.
        predictions: what follows from final states. room: bytes that may still be kept.
    """

    def __init__(
        self,
        plan: Plan,
        sequences: list[torch.Tensor],
        turns: list[tuple[int, int]],
        device: torch.device,
        dtype: torch.dtype,
        room: int = 0,
    ):
        AttentionInterface.register(_RECORDING, self._attend)
        AttentionMaskInterface.register(_RECORDING, lambda *args, **kwargs: None)
        self._last: Recorded | None = None
        self.logits: Logits | None = None
        self._attend_with: Attend | None = None
        self._inputs: torch.Tensor | None = None
        self._to_the_end = True
        self._attention_name = plan.row.attention
        self._output_name = plan.row.projections[-1]
        self._packed = quantised.stays_packed(plan.config)
        self._output_width = plan.geometry.heads * plan.geometry.head_dim
        model = load_weights(
            plan.base.path, plan.base.name,
            dtype=dtype, device=device, attn_implementation=_RECORDING,
        ).eval().requires_grad_(False)  # fmt: skip
        self._base = model.base_model
        self.predictions = Predictions(output_layer(model), model.config.vocab_size)
        self._norm = self._base.get_submodule(plan.row.norm)
        self._active = getattr(model.config, plan.row.streams) if plan.row.streams else None
        self._layers = self._base.get_submodule(plan.row.layers)
        self._sparse, self._stored_by = plan.sparse_layers, plan.stored_by
        self._stored: torch.Tensor | None = None  # what the layer that stores keys was given
        self.hidden: list[torch.Tensor | None] = []
        self._sequences, self._device = sequences, device
        self._turns, self._turns_now = turns, (0, 0)
        # Outputs by layer and sequence that are known already; bytes that more of them may take.
        self._known: dict[tuple[int, int], torch.Tensor] = {}
        self.room = room
        # By sequence, then by layer: layers of different kinds get different arguments.
        self._arguments: list[list[tuple[tuple, dict]]] = []
        self._embed()

    def _attend(
        self, module, query, key, value, attention_mask, scaling=None, sliding_window=None,
        softcap=None, s_aux=None, **kwargs,
    ):  # fmt: skip
        check_arguments(module, {n: kwargs[n] for n in kwargs if n != "dropout"})
        self.logits = logits = Logits.of(query, scaling, softcap, s_aux)
        if sliding_window is not None:
            out = sliding(query, key, value, sliding_window, logits, *self._turns_now)
            return out.transpose(1, 2).contiguous(), None
        self._last = Recorded(self._inputs, query[0], key[0], value[0], logits, *self._turns_now)
        if self._attend_with is not None:
            return self._attend_with(self._last).transpose(0, 1)[None].contiguous(), None
        if not self._to_the_end:
            raise _Stop
        return dense_attention(self._last).transpose(0, 1)[None].contiguous(), None

    def _embed(self) -> None:
        """What each layer is called with; none but the first of the first sequence computes."""
        calls: list[tuple[tuple, dict]] = []

        beside: tuple | None = None  # what a layer returns with its states, where it does
        known, first = False, self._layers[0].forward

        def keep(*args, **kwargs):
            nonlocal beside, known
            whole = dict(kwargs)
            states, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
            if not known:
                output = first(*args, **whole)
                beside, known = output[1:] if isinstance(output, tuple) else None, True
            calls.append((rest, kwargs))
            if len(calls) == self.layers:
                self.hidden.append(states)
                raise _Stop
            return states if beside is None else (states, *beside)

        with self._layers_that(keep):
            for number in range(len(self._sequences)):
                calls.clear()
                with suppress(_Stop):
                    self._read(number)
                self._arguments.append(list(calls))

    @contextmanager
    def _layers_that(self, forward: Callable) -> Iterator[None]:
        """Within the block every layer does this instead."""
        for layer in self._layers:
            layer.forward = forward
        try:
            yield
        finally:
            for layer in self._layers:
                del layer.forward

    def _read(self, number: int):
        """What the base puts out for a sequence, whose turns all go on from its context."""
        ids, (turns, length) = self._sequences[number], self._turns[number]
        place = torch.arange(len(ids))
        context = len(ids) - turns * length
        if turns:
            place[context:] = context + (place[context:] - context) % length
        return self._base(
            input_ids=ids[None].to(self._device),
            position_ids=place[None].to(self._device),
            use_cache=False,
        )

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
        projection = getattr(attention, self._output_name)
        if not self._packed:
            weight = projection.weight.detach().float()
            # GPT-2's Conv1D keeps its weight transposed.
            return weight.T if isinstance(projection, torch.nn.Linear) else weight
        return weight_of(projection, self._output_width, self.hidden[0])

    def run_layer(
        self,
        layer: int,
        numbers: Iterable[int],
        use: Callable[[int, Recorded], None],
        *,
        advance: bool,
    ) -> None:
        """Runs one layer over the sequences `numbers` and hands each recording to `use`.

        With `advance` their residual streams become the layer's output. Without it, and in the last
        layer, dense attention is left out: nothing needs its result, and it is most of the work.
        Where later layers read its keys, these are run as far, for their queries.
        """
        attention = self._layers[layer].get_submodule(self._attention_name)
        readers = [one for one, stored in self._stored_by.items() if stored == layer]
        for number in numbers:
            output = self._known.get((layer, number))
            wanted = bool(readers) or (advance and layer < self._sparse[-1])
            self._to_the_end = wanted and output is None
            with suppress(_Stop), self._recording(attention):
                output = self._output(layer, number, self.hidden[number])
            recorded = self._last
            if readers:
                found = tuple(self._read_by(readers, layer + 1, number, output))
                recorded = replace(recorded, readers=found)
            use(number, recorded)
            if advance and output is not None:
                self.hidden[number] = output
                self._known.pop((layer, number), None)
        self._last = self._inputs = None

    def _read_by(
        self, readers: list[int], first: int, number: int, hidden: torch.Tensor
    ) -> Iterator[Reader]:
        """Runs a sequence from layer `first` on to the last of `readers`, and hands on these."""
        for layer in range(first, readers[-1] + 1):
            before, self._to_the_end = hidden, layer < readers[-1]
            with suppress(_Stop):
                hidden = self._output(layer, number, before)
            if layer in readers:
                yield Reader(layer, self._last.query, self.stream(before))

    def stream(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N] float32, energy of the residual stream, whose states before a layer are `hidden`."""
        read = hidden if self._active is None else hidden[self._active]
        return read[0].float().square().sum(-1)

    def pass_layer(self, layer: int) -> None:
        """Advances all residual streams by a layer that is not to be converted."""
        if layer > self._sparse[-1]:
            return
        for number, hidden in enumerate(self.hidden):
            if hidden is not None:
                self.hidden[number] = self._output(layer, number, hidden)

    def restart(self, hidden: Mapping[int, torch.Tensor]) -> None:
        """Before the first layer again, with these sequences' inputs of it and no others."""
        self.hidden = [hidden.get(number) for number in range(len(self._sequences))]

    def take(self, number: int) -> torch.Tensor:
        """The residual stream [1, N, hidden] of a sequence, which is from then on not kept here."""
        taken, self.hidden[number] = self.hidden[number], None
        return taken

    def _output(self, layer: int, number: int, hidden: torch.Tensor) -> torch.Tensor:
        rest, kwargs = self._arguments[number][layer]
        self._turns_now = self._turns[number]
        output = self._layers[layer](hidden, *rest, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def run_dense(self, number: int, same: int | None = None) -> torch.Tensor:
        """Final states [N, hidden], normalised, of a sequence of which no layer was run yet.

        Outputs of sparse layers are kept, while there is room, until the sequence `same` (None:
        this one) of the same tokens is run through them. Others may leave keys for later layers:
        they are run again.
        """
        same, hidden = number if same is None else same, self.hidden[number]
        for layer in range(self.layers):
            hidden = self._output_with(layer, number, None, hidden)
            size = hidden.nbytes
            if layer in self._sparse[:-1] and size <= self.room:
                self._known[layer, same] = hidden
                self.room -= size
        return self._final(number, hidden)

    def run_on(
        self, number: int, hidden: torch.Tensor, first: int, attend: Mapping[int, Attend]
    ) -> torch.Tensor:
        """Final states [N, hidden], normalised, of one sequence whose other layers are dense.

        Where gradients are wanted, layers are run again for them: only their inputs are kept.

        Args:
            number: of the sequence. hidden: [1, N, hidden], the input of layer `first`.
            attend: what takes attention's place, by layer; of a layer that reads another one's
                keys it is that one's, unless it has its own.
        """
        for layer in range(first, self.layers):
            own = attend.get(layer, attend.get(self._stored_by.get(layer)))
            run = partial(self._output_with, layer, number, own)
            hidden = (
                checkpoint(run, hidden, use_reentrant=False)
                if hidden.requires_grad
                else run(hidden)
            )
        return self._final(number, hidden)

    def _final(self, number: int, hidden: torch.Tensor) -> torch.Tensor:
        """Final states [N, hidden] from what the last layer puts out."""
        if self._active is None:
            return self._norm(hidden)[0]
        # Several side by side: what the base itself makes of them.
        with self._layers_that(lambda *_, **__: hidden):
            return self._read(number).last_hidden_state[0]

    def _output_with(
        self, layer: int, number: int, attend: Attend | None, hidden: torch.Tensor
    ) -> torch.Tensor:
        """A layer's output with `attend` in its attention's place; None: dense.

        A layer that reads keys of another selects by that layer's scores, of that layer's inputs.
        """
        self._to_the_end, self._attend_with, recording = True, attend, nullcontext()
        if layer in self._sparse:
            recording = self._recording(self._layers[layer].get_submodule(self._attention_name))
        elif layer in self._stored_by:
            self._inputs = self._stored
        try:
            with recording:
                return self._output(layer, number, hidden)
        finally:  # running a layer again for its gradient ends early, by an exception
            if layer in self._stored_by.values() and self._inputs is not None:
                self._stored = self._inputs.detach()
            self._attend_with = self._last = self._inputs = None

    @property
    def layers(self) -> int:
        return len(self._layers)
