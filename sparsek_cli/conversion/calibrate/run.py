"""Calibration: every layer's scorer in closed form, map and slope chosen per KV head."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from sparsek_cli.conversion.calibrate.allot import allot
from sparsek_cli.conversion.calibrate.choose import Slots, output_errors
from sparsek_cli.conversion.calibrate.collect import LayerwiseBase, Recorded
from sparsek_cli.conversion.calibrate.maps import SPREAD, LinearMap, Moments, ridge
from sparsek_cli.conversion.calibrate.sequences import Sequence, calibration_sequences
from sparsek_cli.conversion.calibrate.targets import future_attention
from sparsek_cli.conversion.plan import Plan
from sparsek_cli.conversion.write import Scorer
from sparsek_cli.devices import choose_device, choose_dtype
from sparsek_cli.errors import SparsekError

# Slopes in units of score spread per topk tokens: 0 is pure importance.
SLOPES = (0.0, 0.1, 0.3, 1.0, 3.0)
# Sizes that a head's topk may take, in shares of the mean. All heads together spend the same.
SIZES = (0.25, 0.5, 1.0, 2.0, 4.0)
# So steep that nothing but age counts: a plain window, with which candidates are compared.
WINDOW_SLOPE = 30.0
# Queries whose attention forms a target, and queries at which candidates are compared, per
# sequence: a CPU affords fewer.
_TARGET_ROWS = {"cpu": 512, "other": 4096}
_TEXT_ROWS = {"cpu": 32, "other": 256}
_ANSWER_ROWS = {"cpu": 24, "other": 128}
_HELD_OUT = (4, 16)
_HELD_OUT_SHARE = 0.25
# How much a squared error at an answer counts against one in text. Measured on tiny (512 slots
# of 4096): 1 gives up loss, 0.1 drops needles, 0.3 keeps both.
_ANSWER_WEIGHT = 0.3
# Keys of the last part have too few later queries for their largest attention to mean much.
_LAST_PART = 8


def calibrate(plan: Plan, reporter: Any) -> tuple[list[Scorer], dict[str, Any]]:
    """Scorers of all layers and a report of what was chosen and measured.

    Args:
        plan: the conversion; its recipe names text, device, dtype and seed.
        reporter: see `convert.Reporter`.

    Raises:
        SparsekError: no tokenizer, unreadable text, or activations that are not finite.
    """
    started = time.perf_counter()
    recipe = plan.recipe
    device = choose_device(recipe.device)
    dtype = choose_dtype(recipe.dtype, device)
    length, count = plan.calibrate_length, plan.calibrate_tokens // plan.calibrate_length
    reporter.say(f"calibrating on {count} sequences of {length:,} tokens ({device.type})")
    sequences = calibration_sequences(
        _tokenizer(plan), recipe.calibrate, count=count, length=length, seed=recipe.seed
    )
    run = _Run(plan, sequences, device, dtype)
    layers = []
    with torch.inference_mode(), reporter.progress("calibrating", run.base.layers * count) as bar:
        for layer in range(run.base.layers):
            layers.append(run.layer(layer, bar.advance))
    scorers, report = _decide(plan, layers)
    report["seconds"] = round(time.perf_counter() - started, 1)
    return scorers, report


def _tokenizer(plan: Plan) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(plan.base.path)
    except (OSError, ValueError) as error:
        raise SparsekError(
            f"calibration needs a tokenizer, and {plan.base.path} has none that loads",
            hint="put the tokenizer files beside the weights, or give --calibrate none",
        ) from error


class _Run:
    """One calibration: the base, its sequences, and what is measured in a layer."""

    def __init__(
        self, plan: Plan, sequences: list[Sequence], device: torch.device, dtype: torch.dtype
    ):
        self.plan = plan
        self.device = device
        self.kind = "cpu" if device.type == "cpu" else "other"
        self.slots = Slots(plan.window, plan.sinks, _sizes(plan))
        self.sequences = sequences
        least, most = _HELD_OUT
        held = min(most, max(least, int(_HELD_OUT_SHARE * len(sequences)) // 2 * 2))
        self.fitting = range(len(sequences) - held)
        self.held_out = range(len(sequences) - held, len(sequences))
        self.answers = [torch.from_numpy(s.answer) for s in sequences]
        generator = np.random.default_rng(plan.recipe.seed + 1)
        self.target_rows = [self._target_rows(s, generator) for s in sequences]
        self.error_rows = {n: self._error_rows(sequences[n], generator) for n in self.held_out}
        ids = [torch.from_numpy(s.ids) for s in sequences]
        with torch.inference_mode():
            self.base = LayerwiseBase(plan, ids, device, dtype)

    def layer(self, layer: int, advance: Any) -> _Measured:
        """Fits the candidate maps of a layer, then compares them on the held-out sequences."""
        size = self.plan.geometry
        groups = size.kv_heads
        text, recall = (
            Moments(size.hidden, targets * groups, self.device) for targets in (1, 2)
        )

        def fit(number: int, recorded: Recorded) -> None:
            self._add(number, recorded, text, recall)
            advance(1)

        self.base.run_layer(layer, self.fitting, fit, advance=True)
        if not torch.isfinite(text.xx).all() or not torch.isfinite(recall.xx).all():
            raise SparsekError(
                f"activations of layer {layer} are not finite",
                hint="try --dtype float32; the checkpoint may be damaged",
            )
        maps = self._maps(text, recall)
        out_weight = self.base.output_weight(layer)
        candidates = [(name, slope) for name in maps for slope in SLOPES]
        candidates.append(("text", WINDOW_SLOPE))
        unit = SPREAD / self.plan.topk
        measured = _Measured(maps, candidates, unit, len(self.slots.sizes), groups)

        def compare(number: int, recorded: Recorded) -> None:
            scores = {name: map_.scores(recorded.inputs) for name, map_ in maps.items()}
            effective = torch.stack([_aged(scores[name], c * unit) for name, c in candidates])
            rows = self.error_rows[number].to(self.device)
            errors, energy = output_errors(recorded, effective, rows, self.slots, out_weight)
            stream = self.base.hidden[number][0, rows].float().square().sum(-1)
            measured.add(errors, energy, stream, self.answers[number].to(self.device)[rows])
            advance(1)

        self.base.run_layer(layer, self.held_out, compare, advance=True)
        return measured

    def _add(self, number: int, recorded: Recorded, text: Moments, recall: Moments) -> None:
        answer = self.answers[number]
        best, best_answer = future_attention(
            recorded, self.target_rows[number], answer, self.plan.window
        )
        tokens = len(answer)
        first = self.plan.sinks
        if not bool(answer.any()):
            last = max(first + 1, tokens - self.plan.window - tokens // _LAST_PART)
            text.add(recorded.inputs[first:last], best[:, first:last].T)
            return
        # Keys that every answer could have looked at.
        asked = int(answer.nonzero()[0])
        last = max(first + 1, min(asked, tokens) - self.plan.window)
        targets = torch.cat([best, best_answer])[:, first:last].T
        recall.add(recorded.inputs[first:last], targets)

    def _maps(self, text: Moments, recall: Moments) -> dict[str, LinearMap]:
        """Candidate maps by name, normalised on all rows."""
        groups = self.plan.geometry.kv_heads
        everywhere, answered = recall.split(groups)
        both = text + everywhere
        maps = {
            "text": ridge(text),
            "all": ridge(both),
            "answers": ridge(answered),
        }
        maps = {name: map_.normalised(both) for name, map_ in maps.items()}
        blend = (maps["text"] + maps["answers"]).normalised(both)
        return {**maps, "blend": blend}

    def _target_rows(self, sequence: Sequence, generator: np.random.Generator) -> torch.Tensor:
        tokens = len(sequence.ids)
        count = _TARGET_ROWS[self.kind]
        if count >= tokens:
            return torch.arange(tokens)
        # One query out of each of `count` equal parts, and every answer.
        edges = np.linspace(0, tokens, count + 1)
        drawn = (edges[:-1] + generator.random(count) * np.diff(edges)).astype(np.int64)
        answers = np.flatnonzero(sequence.answer)
        return torch.from_numpy(np.union1d(drawn, answers))

    def _error_rows(self, sequence: Sequence, generator: np.random.Generator) -> torch.Tensor:
        tokens = len(sequence.ids)
        # Before the budget is full nothing has been dropped.
        text = np.arange(min(self.plan.budget, tokens // 2), tokens)
        answers = np.flatnonzero(sequence.answer)

        def draw(rows: np.ndarray, most: int) -> np.ndarray:
            return generator.choice(rows, size=min(most, len(rows)), replace=False)

        chosen = np.union1d(
            draw(np.setdiff1d(text, answers), _TEXT_ROWS[self.kind]),
            draw(answers, _ANSWER_ROWS[self.kind]),
        )
        return torch.from_numpy(chosen.astype(np.int64))


class _Measured:
    """What the held-out sequences say about one layer; text and answer rows apart.

    Attributes:
        maps: the layer's candidate maps. candidates: (map, slope in units) tried.
        unit: a slope of 1 per token. errors: sums [2, C, L, G]. energy: sums [2, G] of the
            dense output's. stream: sums [2] of the residual stream's. rows: counts [2].
    """

    def __init__(
        self,
        maps: dict[str, LinearMap],
        candidates: list[tuple[str, float]],
        unit: float,
        sizes: int,
        groups: int,
    ):
        self.maps, self.candidates, self.unit = maps, candidates, unit
        self.errors = np.zeros((2, len(candidates), sizes, groups))
        self.energy = np.zeros((2, groups))
        self.stream = np.zeros(2)
        self.rows = np.zeros(2)

    def add(
        self,
        errors: torch.Tensor,
        energy: torch.Tensor,
        stream: torch.Tensor,
        answer: torch.Tensor,
    ) -> None:
        for kind, chosen in enumerate((~answer, answer)):
            self.errors[kind] += errors[..., chosen].sum(-1).double().cpu().numpy()
            self.energy[kind] += energy[:, chosen].sum(-1).double().cpu().numpy()
            self.stream[kind] += float(stream[chosen].sum())
            self.rows[kind] += int(chosen.sum())

    def relative(self, sums: np.ndarray) -> np.ndarray:
        """Sums [2, ...] as means per row, relative to the residual stream's energy.

        A layer normalises its input, so that what counts is the error's share of the stream.
        """
        rows = np.maximum(self.rows, 1).reshape(2, *[1] * (sums.ndim - 1))
        return sums / rows / (self.stream.sum() / self.rows.sum())

    def combined(self) -> np.ndarray:
        """[C, L, G]: error in text plus weighted error at answers."""
        text, answers = self.relative(self.errors)
        return text + _ANSWER_WEIGHT * answers


def _sizes(plan: Plan) -> tuple[int, ...]:
    """The sizes of topk to compare; the mean alone where all heads get the same."""
    if plan.recipe.budgets == "uniform":
        return (plan.topk,)
    longest = plan.calibrate_length - plan.window - plan.sinks
    sizes = {max(1, round(share * plan.topk)) for share in SIZES}
    return tuple(sorted(size for size in sizes if size <= longest or size <= plan.topk))


def _aged(scores: torch.Tensor, slope: float) -> torch.Tensor:
    """[G, N] float64: score + slope * position."""
    return scores.double() + slope * torch.arange(scores.shape[-1], device=scores.device).double()


def _decide(plan: Plan, layers: list[_Measured]) -> tuple[list[Scorer], dict[str, Any]]:
    """Sizes for all heads, then each head's best map and slope at its size."""
    sizes, groups = _sizes(plan), plan.geometry.kv_heads
    curves = np.stack([layer.combined() for layer in layers])  # [layers, C, L, G]
    smallest = curves.min(1).transpose(0, 2, 1).reshape(-1, len(sizes))
    taken = allot(smallest, sizes, plan.topk * len(smallest))
    mean = sizes.index(plan.topk)
    if smallest[np.arange(len(taken)), taken].sum() > smallest[:, mean].sum():
        taken = np.full(len(taken), mean)
    taken = taken.reshape(len(layers), groups)
    scorers, rows = [], []
    for layer, levels in zip(layers, taken, strict=True):
        heads = np.arange(groups)
        best = layer.combined()[:, levels, heads].argmin(0)
        picked = [layer.candidates[b] for b in best]
        topk = [sizes[level] for level in levels]
        scorers.append(
            Scorer(
                weight=_float32([layer.maps[n].weight[g] for g, (n, _) in enumerate(picked)]),
                bias=_float32([layer.maps[n].bias[g] for g, (n, _) in enumerate(picked)]),
                slopes=np.asarray([slope * layer.unit for _, slope in picked], dtype=np.float32),
                topk=tuple(topk),
            )
        )
        rows.append(
            {
                "map": [name for name, _ in picked],
                "slope": [slope for _, slope in picked],
                "topk": topk,
                "error": layer.relative(layer.errors[:, best, levels, heads]),
                # The last candidate is a window, here with the mean number of slots.
                "window_error": layer.relative(layer.errors[:, -1, mean]),
                "energy": layer.relative(layer.energy),
            }
        )
    return scorers, _report(rows)


def _float32(heads: list[torch.Tensor]) -> np.ndarray:
    return torch.stack(heads).float().cpu().numpy()


def _report(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """Totals over layers and heads, relative to the dense output's energy."""

    def total(key: str, weights: tuple[float, float]) -> float:
        return float(sum(np.dot(weights, layer[key].sum(-1)) for layer in layers))

    report: dict[str, Any] = {}
    kinds = {"": (1.0, _ANSWER_WEIGHT), "text_": (1.0, 0.0), "answer_": (0.0, 1.0)}
    for name, weights in kinds.items():
        energy = max(total("energy", weights), 1e-30)
        report[f"{name}error"] = total("error", weights) / energy
        report[f"{name}window_error"] = total("window_error", weights) / energy
    report["layers"] = [{key: layer[key] for key in ("map", "slope", "topk")} for layer in layers]
    return report
