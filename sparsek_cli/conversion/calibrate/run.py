"""Calibration: every layer's scorer in closed form, map and slope chosen per KV head."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from sparsek_cli.conversion.calibrate.choose import Budget, output_errors
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
# So steep that nothing but age counts: a plain window, with which candidates are compared.
WINDOW_SLOPE = 30.0
# Queries whose attention forms a target, and queries at which candidates are compared, per
# sequence: a CPU affords fewer.
_TARGET_ROWS = {"cpu": 1024, "other": 4096}
_TEXT_ROWS = {"cpu": 32, "other": 256}
_ANSWER_ROWS = {"cpu": 24, "other": 128}
_HELD_OUT = (4, 16)
_HELD_OUT_SHARE = 0.2
# How much a squared error at an answer counts against one in text.
_ANSWER_WEIGHT = 1.0
# Keys of the last part have too few later queries for their largest attention to mean much.
_LAST_PART = 8
# Weight of a fully attended key beside an ignored one, in the map fitted to answers alone.
_FOCUS = 200.0


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
    if device.type == "mps":
        # Apple's GPUs have no float64, in which statistics and selection are kept.
        device = torch.device("cpu")
    dtype = choose_dtype(recipe.dtype, device)
    length, count = plan.calibrate_length, plan.calibrate_tokens // plan.calibrate_length
    reporter.say(f"calibrating on {count} sequences of {length:,} tokens ({device.type})")
    sequences = calibration_sequences(
        _tokenizer(plan), recipe.calibrate, count=count, length=length, seed=recipe.seed
    )
    run = _Run(plan, sequences, device, dtype)
    scorers, layers = [], []
    with torch.inference_mode(), reporter.progress("calibrating", run.base.layers * count) as bar:
        for layer in range(run.base.layers):
            scorer, measured = run.layer(layer, bar.advance)
            scorers.append(scorer)
            layers.append(measured)
    report = _report(layers)
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
        self.budget = Budget(plan.topk, plan.window, plan.sinks)
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

    def layer(self, layer: int, advance: Any) -> tuple[Scorer, dict[str, Any]]:
        """Fits the candidate maps of a layer, then compares them on the held-out sequences."""
        size = self.plan.geometry
        groups = size.kv_heads
        text, recall, focus = (
            Moments(size.hidden, targets * groups, self.device) for targets in (1, 2, 1)
        )

        def fit(number: int, recorded: Recorded) -> None:
            self._add(number, recorded, text, recall, focus)
            advance(1)

        self.base.run_layer(layer, self.fitting, fit, advance=True)
        if not torch.isfinite(text.xx).all() or not torch.isfinite(recall.xx).all():
            raise SparsekError(
                f"activations of layer {layer} are not finite",
                hint="try --dtype float32; the checkpoint may be damaged",
            )
        maps = self._maps(text, recall, focus)
        out_weight = self.base.output_weight(layer)
        candidates = [(name, slope) for name in maps for slope in SLOPES]
        candidates.append(("text", WINDOW_SLOPE))
        unit = SPREAD / self.plan.topk
        totals = _Totals(len(candidates), groups)

        def compare(number: int, recorded: Recorded) -> None:
            scores = {name: map_.scores(recorded.inputs) for name, map_ in maps.items()}
            effective = torch.stack([_aged(scores[name], c * unit) for name, c in candidates])
            rows = self.error_rows[number]
            errors, energy = output_errors(
                recorded, effective, rows.to(self.device), self.budget, out_weight
            )
            totals.add(errors, energy, self.answers[number][rows])
            advance(1)

        self.base.run_layer(layer, self.held_out, compare, advance=True)
        return _choose(maps, candidates, unit, totals)

    def _add(
        self, number: int, recorded: Recorded, text: Moments, recall: Moments, focus: Moments
    ) -> None:
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
        wanted = best_answer[:, first:last].exp().amax(0)
        focus.add(
            recorded.inputs[first:last], best_answer[:, first:last].T, 1 + _FOCUS * wanted
        )

    def _maps(self, text: Moments, recall: Moments, focus: Moments) -> dict[str, LinearMap]:
        """Candidate maps by name, normalised on all rows."""
        groups = self.plan.geometry.kv_heads
        everywhere, answered = recall.split(groups)
        both = text + everywhere
        maps = {
            "text": ridge(text),
            "all": ridge(both),
            "answers": ridge(answered),
            "focus": ridge(focus),
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


class _Totals:
    """Sums of squared errors per candidate and KV head, text and answers apart."""

    def __init__(self, candidates: int, groups: int):
        self.errors = torch.zeros(2, candidates, groups, dtype=torch.float64)
        self.energy = torch.zeros(2, groups, dtype=torch.float64)
        self.rows = torch.zeros(2, dtype=torch.float64)

    def add(self, errors: torch.Tensor, energy: torch.Tensor, answer: torch.Tensor) -> None:
        for kind, rows in enumerate((~answer, answer)):
            chosen = rows.to(errors.device)
            self.errors[kind] += errors[..., chosen].sum(-1).double().cpu()
            self.energy[kind] += energy[:, chosen].sum(-1).double().cpu()
            self.rows[kind] += int(rows.sum())

    def means(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean error [2, C, G] and energy [2, G] per row."""
        rows = self.rows.clamp_min(1)
        return self.errors / rows[:, None, None], self.energy / rows[:, None]


def _aged(scores: torch.Tensor, slope: float) -> torch.Tensor:
    """[G, N] float64: score + slope * position."""
    return scores.double() + slope * torch.arange(scores.shape[-1], device=scores.device).double()


def _choose(
    maps: dict[str, LinearMap],
    candidates: list[tuple[str, float]],
    unit: float,
    totals: _Totals,
) -> tuple[Scorer, dict[str, Any]]:
    """Each KV head's best candidate; `unit` turns a candidate's slope into one per token."""
    errors, energy = totals.means()
    best = (errors[0] + _ANSWER_WEIGHT * errors[1]).argmin(0)
    heads = range(len(best))
    picked = [candidates[int(b)] for b in best]
    window = errors[:, -1]
    scorer = Scorer(
        weight=_float32([maps[name].weight[g] for g, (name, _) in enumerate(picked)]),
        bias=_float32([maps[name].bias[g] for g, (name, _) in enumerate(picked)]),
        slopes=np.asarray([slope * unit for _, slope in picked], dtype=np.float32),
    )
    return scorer, {
        "map": [name for name, _ in picked],
        "slope": [slope for _, slope in picked],
        "error": [[float(errors[k, best[g], g]) for g in heads] for k in range(2)],
        "window_error": window.tolist(),
        "energy": energy.tolist(),
    }


def _float32(heads: list[torch.Tensor]) -> np.ndarray:
    return torch.stack(heads).float().cpu().numpy()


def _report(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """Totals over layers and heads, relative to the dense output's energy."""

    def total(key: str, kinds: slice) -> float:
        return float(sum(np.sum(np.asarray(layer[key])[kinds]) for layer in layers))

    report: dict[str, Any] = {}
    for name, kinds in (("", slice(0, 2)), ("text_", slice(0, 1)), ("answer_", slice(1, 2))):
        energy = max(total("energy", kinds), 1e-30)
        report[f"{name}error"] = total("error", kinds) / energy
        report[f"{name}window_error"] = total("window_error", kinds) / energy
    report["layers"] = [{"map": layer["map"], "slope": layer["slope"]} for layer in layers]
    return report
