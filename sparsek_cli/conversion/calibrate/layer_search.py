"""One layer after the other: candidate maps fitted, compared, and what their errors are worth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from sparsek_cli.conversion.calibrate import rows
from sparsek_cli.conversion.calibrate.effort import Effort, affordable
from sparsek_cli.conversion.calibrate.head_budgets.by_error import shares_by_errors, sizes_of
from sparsek_cli.conversion.calibrate.head_budgets.by_threshold import FutureAttention
from sparsek_cli.conversion.calibrate.head_budgets.held_out import HeldOut
from sparsek_cli.conversion.calibrate.layerwise import LayerwiseBase
from sparsek_cli.conversion.calibrate.recorded import Reading, Recorded
from sparsek_cli.conversion.calibrate.scorers.linear import Fit, Map, Targets
from sparsek_cli.conversion.calibrate.scorers.ridge import SPREAD
from sparsek_cli.conversion.calibrate.scorers.targets import future_attention
from sparsek_cli.conversion.calibrate.sensitivity.compile_ahead import Document, compile_ahead
from sparsek_cli.conversion.calibrate.sensitivity.divergence import Rows, Whole, chosen_attention
from sparsek_cli.conversion.calibrate.sensitivity.gradient import Gradients
from sparsek_cli.conversion.calibrate.sensitivity.output_error import Slots, output_errors
from sparsek_cli.conversion.calibrate.sequences.sequence import Sequence
from sparsek_cli.conversion.planned import Plan
from sparsek_cli.errors import SparsekError

# So steep that nothing but age counts: a plain window, with which candidates are compared.
WINDOW_SLOPE = 30.0
# Candidates of a head that are compared on all documents.
_FINALISTS = 4
# An error at an answer against one in text, as long as it is not known what either is worth.
_GUESS = 0.3
# Documents that are run through the whole model.
_WHOLE = 4
# Parts told again in each document along whose gradient budgets are refined.
_REFINING_TURNS = 2


class LayerSearch:
    """The base layer by layer: its sequences, and what is fitted and measured in each."""

    def __init__(
        self,
        plan: Plan,
        fitting: list[Sequence],
        held_out: list[Sequence],
        device: torch.device,
        dtype: torch.dtype,
        fit: Callable[[Plan, torch.device], Fit],
        effort: Effort,
    ):
        self.plan, self.method = plan, plan.calibration.method
        self.device, self.fit = device, fit
        self.can = affordable(device)
        self.slots = Slots(plan.window, plan.sinks, sizes_of(plan))
        self.fitting = range(len(fitting))
        self.held_out = range(len(fitting), len(fitting) + len(held_out))
        whole = self.can.whole_tokens // plan.calibrate_length
        refining = self.can.refining if effort.refinements else 0
        few = self.held_out[: max(1, min(_WHOLE, max(2, whole), len(held_out) - refining))]
        unread = held_out[len(few) :][:refining]
        plain = [part for sequence in unread for part in sequence.plain(_REFINING_TURNS)]
        sequences = [*fitting, *held_out, *plain]
        self.sequences = sequences
        self.answers = [torch.from_numpy(s.answer) for s in sequences]
        generator = np.random.default_rng(plan.seed + 1)
        self.target_rows = [
            rows.target_rows(sequence, self.can.target_rows, generator)
            for sequence in (*fitting, *held_out)
        ]
        self.error_rows = {
            n: rows.error_rows(sequences[n], plan.budget, self.can.error_rows, generator)
            for n in self.held_out
        }
        ids = [torch.from_numpy(s.ids) for s in sequences]
        with torch.no_grad():
            turns = [(s.turns, s.turn_length) for s in sequences]
            self.base = LayerwiseBase(plan, ids, turns, device, dtype, self.can.kept)
            # The first inputs are kept: sequences are read once more when all is decided.
            self._again = {n: self.base.hidden[n] for n in self._to_read_again()}
            self._valued = self._to_value(few)
            self.whole = Whole(self.base, self._counted(few))
            added = range(self.held_out.stop, len(sequences))
            shapes = [Document(s.context, s.turns, s.turn_length) for s in sequences]
            self.end_compiling = compile_ahead(
                plan, self.base.logits, self.base.hidden[0],
                [shapes[n] for n in few], [shapes[n] for n in added],
            )  # fmt: skip
            # A document without turns is one of those to compare on as it is.
            same = {n: m for n in added for m in self.held_out if sequences[n] is sequences[m]}
            self.gradients = Gradients(self.base, self._counted(added), same)
        self.part: dict[int, HeldOut] = {}
        self.part_inputs: dict[int, torch.Tensor] = {}

    def _counted(self, numbers: range) -> dict[int, Rows]:
        """By document the rows at which the whole model's losses count."""
        return {
            n: Rows(
                torch.from_numpy(rows.text_rows(self.sequences[n], self.plan.budget)),
                self.answers[n].nonzero()[:, 0],
            ).to(self.device)
            for n in numbers
        }

    def _to_value(self, numbers: range) -> list[int]:
        """Where only one of these documents is affordable: the shortest that has answers."""
        most = self.can.valued
        if most > 1:
            return [*numbers[:most]]
        answering = [n for n in numbers if bool(self.answers[n].any())] or [*numbers]
        return sorted(answering, key=lambda n: len(self.sequences[n].ids))[:most]

    def _to_read_again(self) -> list[int]:
        """Documents of full length, of those that judge little, and texts that lose much.

        How much is missing grows with the length: whoever knows short ones alone is far off.
        """
        plan, room = self.plan, self.can.stand_in_tokens
        documents = self.held_out[-max(1, room // 2 // plan.calibrate_length) :]
        long = plan.fit_length >= 2 * plan.budget
        return [*documents, *(self.fitting[: room // 2 // plan.fit_length] if long else ())]

    @property
    def reading_again(self) -> int:
        """How many sequences `read_again` hands out."""
        return len(self._again)

    def read_again(self) -> list[int]:
        """Puts some sequences in front of the first layer again, and all others away."""
        self.base.restart(self._again)
        return [*self._again]

    def layer(self, layer: int, advance: Any) -> HeldOut:
        """Fits the candidate maps of a layer, then compares them on the held-out sequences."""
        fit = self.fit(self.plan, self.device)

        def add(number: int, recorded: Recorded) -> None:
            self._add(number, recorded, fit)
            advance(1)

        self.base.run_layer(layer, self.fitting, add, advance=True)
        try:
            maps = fit.maps()
        except FloatingPointError as error:
            raise SparsekError(
                f"activations of layer {layer} are not finite",
                hint="try --dtype float32; the checkpoint may be damaged",
            ) from error
        sparse = self.plan.sparse_layers
        size, place = -(-len(sparse) // self.can.parts), sparse.index(layer)
        if place % size == 0:
            self.part, self.part_inputs = {}, self.whole.inputs(self._valued)
        self.part[layer] = self._narrowed(layer, maps, advance)
        if place % size == size - 1 or layer == sparse[-1]:
            self._value(self.part)
        return self.part[layer]

    def _value(self, part: dict[int, HeldOut]) -> None:
        """What errors of these neighbouring layers are worth, with their own slots shared out.

        Near the shares that heads will get: evenly spread, the errors of heads that look things up
        would hide those of all others.
        """
        shares = shares_by_errors(self.plan, list(part.values()), _GUESS)
        attend, errors = {}, np.zeros(2)
        for (number, layer), topk in zip(part.items(), shares, strict=True):
            choice, error = layer.choose(topk, self.slots.sizes, _GUESS)
            attend[number] = chosen_attention(self.plan, layer.maps, choice)
            errors += error
        worth = self.whole.divergence(attend, self.part_inputs, min(part)) / np.maximum(
            errors, 1e-9
        )
        for layer in part.values():
            layer.worth = worth

    def _narrowed(self, layer: int, maps: dict[str, Map], advance: Any) -> HeldOut:
        """All candidates on half of the documents at two sizes, then each head's best on all."""
        groups = self.plan.geometry.kv_heads
        unit = SPREAD / self.plan.topk
        everything = [[(name, slope)] * groups for name in maps for slope in self.method.slopes]
        few = self.held_out[: max(1, len(self.held_out) // 2)]
        # The mean, and what heads get that look far back: the best may differ.
        twice = min(2 * self.plan.topk, self.slots.sizes[-1])
        slots = replace(self.slots, sizes=tuple(sorted({self.plan.topk, twice})))
        first = HeldOut(maps, everything, unit, len(slots.sizes), groups)
        self._compare(layer, few, slots, first)
        errors = first.combined(_GUESS)
        # In units of the best, so that both sizes count alike.
        errors /= np.maximum(errors.min(0), 1e-30)
        order = errors.mean(1).argsort(axis=0, kind="stable")[:_FINALISTS]
        finalists = [[everything[c][g] for g, c in enumerate(row)] for row in order]
        window = [(next(iter(maps)), WINDOW_SLOPE)] * groups
        measured = HeldOut(maps, [*finalists, window], unit, len(self.slots.sizes), groups)
        self._compare(layer, self.held_out, self.slots, measured, advance)
        return measured

    def _compare(
        self, layer: int, numbers: range, slots: Slots, held_out: HeldOut, advance: Any = None
    ) -> None:
        """Adds the errors of `held_out.candidates`; with `advance` the layer is then done."""
        readers = [one for one, stored in self.plan.stored_by.items() if stored == layer]
        out_weights = [self.base.output_weight(one) for one in (layer, *readers)]

        def compare(number: int, recorded: Recorded) -> None:
            scores = {name: map_.of(recorded) for name, map_ in held_out.maps.items()}
            effective = _effective(scores, held_out, recorded.positions)
            asked = self.error_rows[number].to(self.device)
            stream = self.base.stream(self.base.hidden[number])[asked]
            shares = [stream.sum() / one.stream[asked].sum() for one in recorded.readers]
            errors = [
                _errors(reading, reading.of(effective), slots, out_weights, [1.0, *shares])
                for reading in recorded.readings(asked)
            ]
            answer = self.answers[number].to(self.device)[asked]
            held_out.add(torch.cat(errors, -1), stream, answer)
            if advance is not None:
                held_out.attention += self._attention(number, recorded)
                advance(1)

        self.base.run_layer(layer, numbers, compare, advance=advance is not None)

    def _attention(self, number: int, recorded: Recorded) -> list[FutureAttention]:
        """What is looked at of the pairs that a held-out document tells again; nothing if none."""
        if self.sequences[number].told is None:
            return []
        queries, answer = self.target_rows[number], self.answers[number]
        window, sinks, context = self.plan.window, self.plan.sinks, recorded.context
        again, _ = future_attention(recorded, queries[answer[queries]], answer, window)
        pairs = rows.valued_keys(self.sequences[number], self.plan).to(again.device)
        return [FutureAttention(again[:, pairs].cpu().numpy(), context - window - sinks)]

    def _add(self, number: int, recorded: Recorded, fit: Fit) -> None:
        answer = self.answers[number]
        everywhere, answered = future_attention(
            recorded, self.target_rows[number], answer, self.plan.window, self.method.target
        )
        pairs = rows.valued_keys(self.sequences[number], self.plan)
        answered = answered[:, pairs] if bool(answer.any()) else None
        fit.add(recorded, Targets(pairs.to(self.device), everywhere[:, pairs], answered))


def _errors(
    reading: Reading,
    effective: torch.Tensor,
    slots: Slots,
    out_weights: list[torch.Tensor],
    shares: list[torch.Tensor | float],
) -> torch.Tensor:
    """`output_errors` of all layers that read the keys, together.

    Args:
        effective: [C, G, tokens] float64. out_weights: W_o of each of these layers.
        shares: what an error of each counts: it is one of its own residual stream.
    """
    each = zip(reading.recorded.by_reader(), out_weights, shares, strict=True)
    return sum(
        share * output_errors(one, effective, reading.rows, slots, out_weight)
        for one, out_weight, share in each
    )


def _effective(
    scores: dict[str, torch.Tensor], held_out: HeldOut, positions: torch.Tensor
) -> torch.Tensor:
    """[C, G, N] float64: score + slope * position of every candidate, by KV head.

    Args:
        scores: [G, N] of each map. positions: [N] int64.
    """
    places = {name: place for place, name in enumerate(scores)}
    maps = [[places[name] for name, _ in row] for row in held_out.candidates]
    slopes = [[slope * held_out.unit for _, slope in row] for row in held_out.candidates]
    maps, slopes = (torch.tensor(rows, device=positions.device) for rows in (maps, slopes))
    every = torch.stack([*scores.values()]).double()
    chosen = every[maps, torch.arange(every.shape[1], device=positions.device)]
    return chosen + slopes.double()[..., None] * positions.double()
