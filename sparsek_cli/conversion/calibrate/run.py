"""Calibration: every layer's scorer fitted, map and slope chosen per KV head."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from sparsek_cli import quantised
from sparsek_cli.conversion.calibrate import rows
from sparsek_cli.conversion.calibrate.head_budgets.by_threshold import FutureAttention
from sparsek_cli.conversion.calibrate.head_budgets.choice import Choice
from sparsek_cli.conversion.calibrate.head_budgets.compare import Effort, settle
from sparsek_cli.conversion.calibrate.head_budgets.decide import (
    Candidate,
    HeldOut,
    scorers_of,
    shares_by_errors,
    sizes_of,
)
from sparsek_cli.conversion.calibrate.layerwise import LayerwiseBase
from sparsek_cli.conversion.calibrate.recorded import Recorded
from sparsek_cli.conversion.calibrate.scorers.linear import Fit, LinearFit, Map, Targets
from sparsek_cli.conversion.calibrate.scorers.mlp import MlpFit
from sparsek_cli.conversion.calibrate.scorers.ridge import SPREAD
from sparsek_cli.conversion.calibrate.scorers.targets import future_attention
from sparsek_cli.conversion.calibrate.sensitivity.divergence import Rows, Whole, chosen_attention
from sparsek_cli.conversion.calibrate.sensitivity.gradient import Gradients
from sparsek_cli.conversion.calibrate.sensitivity.output_error import Slots, output_errors
from sparsek_cli.conversion.calibrate.sequences.build import calibration_sequences
from sparsek_cli.conversion.calibrate.sequences.reconstruction import LONGEST
from sparsek_cli.conversion.calibrate.sequences.sequence import Sequence
from sparsek_cli.conversion.planned import Plan
from sparsek_cli.conversion.write import Scorer
from sparsek_cli.devices import choose_device, choose_dtype
from sparsek_cli.errors import SparsekError
from sparsek_cli.families.layers import has_states
from sparsek_cli.loading import check_tokenizer, load_tokenizer

# By the kind of scorer, what fits its candidate maps.
FITS: dict[str, Callable[[Plan, torch.device], Fit]] = {"linear": LinearFit.of, "mlp": MlpFit}
# So steep that nothing but age counts: a plain window, with which candidates are compared.
WINDOW_SLOPE = 30.0
# Queries whose attention forms a target, and queries at which candidates are compared, per
# sequence: a CPU affords fewer.
_TARGET_ROWS = {"cpu": 512, "other": 4096}
_ERROR_ROWS = {"cpu": (64, 32), "other": (256, 192)}  # in text, at answers
_HELD_OUT = {"cpu": 4, "other": 12}
# Parts of a document that are told again (None: all), and most tokens of each.
_TURNS = {"cpu": 2, "other": None}
_TURN_LENGTH = {"cpu": 512, "other": LONGEST}
_FINALISTS = 4
# An error at an answer against one in text, as long as it is not known what either is worth.
_GUESS = 0.3
# Documents that are run through the whole model (of very long ones a CPU takes two, enough for
# their many rows), those of them on which single parts of it are valued, and how many parts of
# neighbouring layers there are.
_WHOLE = 4
_VALUED = {"cpu": 1, "other": 2}
_WHOLE_TOKENS = {"cpu": 8192, "other": 1 << 20}
_PARTS = {"cpu": 12, "other": 48}
# Proposals that are run, and how often the best is refined.
_EFFORT = {"cpu": Effort(5, 1), "other": Effort(8, 2)}
# Documents, others than those, along whose gradient the best proposal is refined, and their turns.
_REFINING = {"cpu": 1, "other": 4}
_REFINING_TURNS = 2
# Shorter documents are not halved.
_HALVED = 2048


def calibrate(plan: Plan, reporter: Any) -> tuple[list[Scorer], dict[str, Any]]:
    """Scorers of all layers and a report of what was chosen and measured.

    Args:
        plan: the conversion; its calibration names text, device and dtype.
        reporter: see sparsek_cli/reporter.py.

    Raises:
        SparsekError: no tokenizer, unreadable text, or activations that are not finite.
    """
    started = time.perf_counter()
    found = search(plan, reporter, FITS[plan.calibration.method.scorer])
    report = found.report | {"seconds": round(time.perf_counter() - started, 1)}
    return scorers_of(found.layers, found.choices), report


@dataclass(frozen=True)
class Found:
    """What calibration found: candidates and errors of each layer, the choice, and a report."""

    layers: list[HeldOut]
    choices: list[Choice]
    report: dict[str, Any]


# What is made in a caller's inference mode has no gradients, along which slots are moved.
@torch.inference_mode(False)
def search(
    plan: Plan, reporter: Any, fit: Callable[[Plan, torch.device], Fit] = LinearFit.of
) -> Found:
    """The choice among the candidate maps that `fit` makes; see `calibrate`."""
    wanted = plan.calibration
    device = choose_device(wanted.device)
    dtype = choose_dtype(wanted.dtype, device)
    fitting = plan.calibrate_tokens // plan.fit_length
    kind = _kind(device)
    reporter.say(
        f"calibrating on {fitting} sequences of {plan.fit_length:,} tokens ({device.type})"
    )
    sequences = calibration_sequences(
        _tokenizer(plan),
        wanted.text,
        fitting=fitting,
        fit_length=plan.fit_length,
        held_out=_HELD_OUT[kind],
        lengths=_lengths(plan),
        documents=wanted.method.documents,
        seed=plan.seed,
        # A state goes through all tokens: it cannot continue from the context several times.
        turns=1 if has_states(plan.types) else _TURNS[kind],
        longest=_TURN_LENGTH[kind],
    )
    effort = _effort(plan, kind)
    run = _Run(plan, *sequences, device, dtype, fit, effort)
    depth = len(plan.sparse_layers)
    with torch.no_grad():
        with reporter.progress("calibrating", depth * sum(map(len, sequences))) as bar:
            layers = []
            for layer in range(run.base.layers):
                if layer in plan.sparse_layers:
                    layers.append(run.layer(layer, bar.advance))
                else:
                    run.base.pass_layer(layer)
        with reporter.progress("comparing whole models", effort.passes) as bar:
            choices, report = settle(plan, layers, run.whole, run.gradients, effort, bar.advance)
    if report["not_refined"]:
        reporter.say(f"budgets were not refined further: {report['not_refined']}")
    return Found(layers, choices, report)


def _tokenizer(plan: Plan) -> Any:
    try:
        tokenizer = load_tokenizer(plan.tokenizer)
    except SparsekError as error:
        raise SparsekError(
            f"calibration needs a tokenizer: {error.message}",
            hint="put tokenizer files beside the weights, name a tokenizer with --tokenizer, or "
            "give --calibrate none",
        ) from error
    check_tokenizer(tokenizer, plan.config["vocab_size"], plan.tokenizer.name)
    return tokenizer


def _lengths(plan: Plan) -> tuple[int, ...]:
    """Of documents to compare on: what is read may also be half as long as it could be."""
    length = plan.calibrate_length
    half = length // 2 if length >= max(4 * plan.budget, _HALVED) else length
    return (length, half)


def _effort(plan: Plan, kind: str) -> Effort:
    """What is compared: equal budgets cannot be moved, and packed weights have no gradient."""
    fixed = not plan.calibration.per_head or quantised.stays_packed(plan.config)
    return replace(_EFFORT[kind], refinements=0) if fixed else _EFFORT[kind]


def _kind(device: torch.device) -> str:
    """What the device can afford: a key of the tables above."""
    return "cpu" if device.type == "cpu" else "other"


class _Run:
    """One calibration: the base, its sequences, and what is measured in a layer."""

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
        self.kind = _kind(device)
        self.slots = Slots(plan.window, plan.sinks, sizes_of(plan))
        self.fitting = range(len(fitting))
        self.held_out = range(len(fitting), len(fitting) + len(held_out))
        affordable = _WHOLE_TOKENS[self.kind] // plan.calibrate_length
        refining = _REFINING[self.kind] if effort.refinements else 0
        few = self.held_out[: max(1, min(_WHOLE, max(2, affordable), len(held_out) - refining))]
        others = held_out[len(few) :][:refining]
        plain = [part for sequence in others for part in sequence.plain(_REFINING_TURNS)]
        sequences = [*fitting, *held_out, *plain]
        self.sequences = sequences
        self.answers = [torch.from_numpy(s.answer) for s in sequences]
        generator = np.random.default_rng(plan.seed + 1)
        self.target_rows = [
            rows.target_rows(sequence, _TARGET_ROWS[self.kind], generator)
            for sequence in (*fitting, *held_out)
        ]
        self.error_rows = {
            n: rows.error_rows(sequences[n], plan.budget, _ERROR_ROWS[self.kind], generator)
            for n in self.held_out
        }
        ids = [torch.from_numpy(s.ids) for s in sequences]
        with torch.no_grad():
            turns = [(s.turns, s.turn_length) for s in sequences]
            self.base = LayerwiseBase(plan, ids, turns, device, dtype)
            self._valued = self._to_value(few)
            self.whole = Whole(self.base, self._counted(few))
            others = range(self.held_out.stop, len(sequences))
            self.gradients = Gradients(self.base, self._counted(others))
        self.part: dict[int, HeldOut] = {}

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
        most = _VALUED[self.kind]
        if most > 1:
            return [*numbers[:most]]
        answering = [n for n in numbers if bool(self.answers[n].any())] or [*numbers]
        return sorted(answering, key=lambda n: len(self.sequences[n].ids))[:most]

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
        size, place = -(-len(sparse) // _PARTS[self.kind]), sparse.index(layer)
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
        out_weight = self.base.output_weight(layer)

        def compare(number: int, recorded: Recorded) -> None:
            scores = {name: map_.of(recorded) for name, map_ in held_out.maps.items()}
            asked = self.error_rows[number].to(self.device)
            errors = []
            for reading in recorded.readings(asked):
                here = {name: reading.of(score) for name, score in scores.items()}
                effective = torch.stack(
                    [_effective(here, row, held_out.unit) for row in held_out.candidates]
                )
                errors.append(
                    output_errors(reading.recorded, effective, reading.rows, slots, out_weight)
                )
            stream = self.base.hidden[number][0, asked].float().square().sum(-1)
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


def _effective(
    scores: dict[str, torch.Tensor], candidates: list[Candidate], unit: float
) -> torch.Tensor:
    """[G, N] float64: each head's score + slope * position, for its own map and slope."""
    chosen = torch.stack([scores[name][g] for g, (name, _) in enumerate(candidates)]).double()
    slopes = torch.tensor([slope * unit for _, slope in candidates], device=chosen.device)
    positions = torch.arange(chosen.shape[-1], device=chosen.device)
    return chosen + slopes.double()[:, None] * positions.double()
