"""Calibration: every layer's scorer fitted, map and slope chosen per KV head."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from sparsek_cli import quantised
from sparsek_cli.conversion.calibrate.chosen_scorers import scorers_of
from sparsek_cli.conversion.calibrate.effort import Effort, affordable
from sparsek_cli.conversion.calibrate.head_budgets.choice import Choice
from sparsek_cli.conversion.calibrate.head_budgets.decide import decide
from sparsek_cli.conversion.calibrate.head_budgets.held_out import HeldOut
from sparsek_cli.conversion.calibrate.layer_search import LayerSearch
from sparsek_cli.conversion.calibrate.scorers.linear import Fit, LinearFit
from sparsek_cli.conversion.calibrate.scorers.mlp import MlpFit
from sparsek_cli.conversion.calibrate.sequences.build import calibration_sequences
from sparsek_cli.conversion.calibrate.stand_ins import fit_stand_ins, judged
from sparsek_cli.conversion.planned import Plan
from sparsek_cli.conversion.write import Scorer
from sparsek_cli.devices import choose_device, choose_dtype
from sparsek_cli.errors import SparsekError
from sparsek_cli.families.layers import has_states
from sparsek_cli.loading import check_tokenizer, load_tokenizer

# By the kind of scorer, what fits its candidate maps.
FITS: dict[str, Callable[[Plan, torch.device], Fit]] = {"linear": LinearFit.of, "mlp": MlpFit}
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
    return scorers_of(found.layers, found.choices, found.stand_ins), report


@dataclass(frozen=True)
class Found:
    """What calibration found.

    Attributes:
        layers: candidates and errors of each. choices: what was taken of them. report: what for.
        stand_ins: [H, 1, 2 D + 2] of each layer; None where they do no good, or nobody wants them.
    """

    layers: list[HeldOut]
    choices: list[Choice]
    report: dict[str, Any]
    stand_ins: list[np.ndarray] | None = None


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
    can = affordable(device)
    reporter.say(
        f"calibrating on {fitting} sequences of {plan.fit_length:,} tokens ({device.type})"
    )
    sequences = calibration_sequences(
        _tokenizer(plan),
        wanted.text,
        fitting=fitting,
        fit_length=plan.fit_length,
        held_out=can.held_out,
        lengths=_lengths(plan),
        documents=wanted.method.documents,
        seed=plan.seed,
        # A state goes through all tokens: it cannot continue from the context several times.
        turns=1 if has_states(plan.types) else can.turns,
        longest=can.turn_length,
        say=reporter.say,
    )
    effort = _effort(plan, can.whole_models)
    found = LayerSearch(plan, *sequences, device, dtype, fit, effort)
    depth = len(plan.sparse_layers)
    try:
        with torch.no_grad():
            with reporter.progress("calibrating", depth * sum(map(len, sequences))) as bar:
                layers = []
                for layer in range(found.base.layers):
                    if layer in plan.sparse_layers:
                        layers.append(found.layer(layer, bar.advance))
                    else:
                        found.base.pass_layer(layer)
            with reporter.progress("comparing whole models", effort.passes) as bar:
                choices, report = decide(
                    plan, layers, found.whole, found.gradients, effort, bar.advance
                )
            stand_ins = None
            if wanted.stand_ins:
                with reporter.progress("fitting stand-ins", depth * found.reading_again) as bar:
                    stand_ins = fit_stand_ins(found, layers, choices, bar.advance)
                stand_ins, with_them = judged(found, layers, choices, stand_ins, report)
                report |= with_them
    finally:
        found.end_compiling()
    if report["not_refined"]:
        reporter.say(f"budgets were not refined further: {report['not_refined']}")
    if wanted.stand_ins and stand_ins is None:
        reporter.say("stand-ins for evicted pairs did no good here: there are none")
    return Found(layers, choices, report, stand_ins)


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


def _effort(plan: Plan, most: Effort) -> Effort:
    """What is compared: equal budgets cannot be moved, and packed weights have no gradient."""
    fixed = not plan.calibration.per_head or quantised.stays_packed(plan.config)
    return replace(most, refinements=0) if fixed else most
