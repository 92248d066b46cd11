"""One evaluation from recipe to result folder: one task x length x policy at a time."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsek_cli.evaluation.loading import harness_for, load_model, most_tokens
from sparsek_cli.evaluation.measure import run_unit
from sparsek_cli.evaluation.policies.policy import Policy
from sparsek_cli.evaluation.policies.registry import OWN, check_names, plan_policies
from sparsek_cli.evaluation.processes import Ranks
from sparsek_cli.evaluation.report.record import Record, default_folder, settings_of, write_reports
from sparsek_cli.evaluation.report.store import (
    RESULTS,
    Store,
    check_results,
    digest,
    load_unit,
    to_json,
)
from sparsek_cli.evaluation.report.store import write_atomically as write
from sparsek_cli.evaluation.tasks.catalogue import expand
from sparsek_cli.evaluation.tasks.load_tasks import Unit, data_fingerprint, load_units, refuse_unfit
from sparsek_cli.evaluation.tasks.skipped import Absent, explained

if TYPE_CHECKING:
    from sparsek_cli.console import Console
    from sparsek_cli.recipes.schema_evaluate import EvaluateRecipe

Pair = tuple[Unit, Policy]


def evaluate(
    recipe: "EvaluateRecipe",
    console: "Console",
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Runs everything `recipe` asks for and writes the result folder.

    Args:
        console: where progress goes (`say`, `detail`, `progress`).
        resume: keep what an interrupted run with the same settings finished.
        overwrite: replace the results in the folder, of these settings or others.

    Returns:
        What results.json holds, with `folder` added.
    """
    from sparsek_cli.last_model import model_or_default

    output = Path(os.path.expanduser(recipe.output)) if recipe.output else None
    ranks = Ranks()
    say = console.say if ranks.first else _unheard
    entries = expand(recipe.tasks)
    check_names(recipe.baselines)
    checkpoint = model_or_default(recipe.model, recipe.revision, say=say)
    if output is not None:
        check_results(output, resume=resume, model=checkpoint.path)
    files = data_fingerprint(recipe)
    model, tokenizer, own = load_model(checkpoint, recipe, ranks.device(recipe.device))
    policies = plan_policies(model, recipe.baselines, recipe.budgets, recipe.seed, own=own)
    if not own:
        rows = ", ".join(policy.label for policy in policies)
        say(f"{checkpoint.name} is not converted, so it has no scores: rows are {rows}")
    max_length = most_tokens(model, tokenizer, recipe.max_length, say)
    lm = harness_for(model, tokenizer, recipe, max_length)
    say(f"preparing {', '.join(recipe.tasks)}")
    units, absent = load_units(
        entries,
        recipe,
        tokenizer=tokenizer,
        tokenizer_path=str(checkpoint.path),
        max_length=max_length,
        say=say,
    )
    units, refused = refuse_unfit(units, lm, recipe)
    plan, unfit = _plan(units, policies)
    for lines, remedy in explained([*absent, *refused, *unfit]):
        for line in lines:
            say(f"not measured: {line}")
        say(f"hint: {remedy}")
    record = Record(
        recipe,
        checkpoint,
        model,
        settings_of(recipe, checkpoint, model, max_length, files),
        policies,
        check_policies(model, policies, max_length),
        [*absent, *refused, *unfit],
        planned=len(plan),
    )
    folder = output or default_folder(record)
    store = None
    if ranks.first:
        store = Store(folder, digest(record.settings), resume=resume, overwrite=overwrite)
    ranks.wait()  # for the folder; and again before the first result is written into it
    finished = _finished(folder, plan) if resume else {}
    if finished:
        say(f"resuming: {len(finished)} of {len(plan)} results are in {folder}")
    ranks.wait()
    ranks.join(lm)
    try:
        _measure(plan, finished, lm, record, store, ranks, console)
    except KeyboardInterrupt:
        if ranks.first:
            _write(folder, record)
        say(f"stopped; what is finished is in {folder}: go on with --resume")
        raise
    if ranks.first:
        _write(folder, record)
    return record.report() | {"folder": str(folder)}


def _write(folder: Path, record: Record) -> None:
    """results.json and the reports of what there is."""
    report = record.report()
    write(folder / RESULTS, to_json(report))
    if report["units"]:
        write_reports(folder, report)


def _unheard(text: str) -> None:
    """What a process says that is not the first one."""


def _plan(units: Sequence[Unit], policies: Sequence[Policy]) -> tuple[list[Pair], list[Absent]]:
    """What is measured, in order, and which tasks a policy cannot be measured on."""
    plan, unfit = [], []
    for unit in units:
        for policy in policies:
            reason = policy.unfit_for(unit.task)
            if reason is None:
                plan.append((unit, policy))
            else:
                name = f"{unit.name} under {policy.label}"
                unfit.append(Absent(name, reason, "window and random can be measured"))
    return plan, unfit


def _finished(folder: Path, plan: Sequence[Pair]) -> dict[tuple[str, str], dict[str, Any]]:
    """The stored results among what is planned."""
    found = {}
    for unit, policy in plan:
        result = load_unit(folder, policy.label, unit.name)
        if result is not None:
            found[unit.name, policy.label] = result
    return found


def _measure(
    plan: Sequence[Pair],
    finished: dict[tuple[str, str], dict[str, Any]],
    lm: Any,
    record: Record,
    store: Store | None,
    ranks: Ranks,
    console: "Console",
) -> None:
    """Measures what is not finished; every result is on disk before the next one begins."""
    total = sum(
        len(unit.task.instances)
        for unit, policy in plan
        if (unit.name, policy.label) not in finished
    )
    with console.progress("evaluating", total=total) as bar:
        lm.advance = bar.advance
        for number, (unit, policy) in enumerate(plan):
            done = finished.get((unit.name, policy.label))
            if done is not None:
                record.results.append(done)
                continue
            bar.describe(f"{unit.name} {policy.label}")
            started = time.monotonic()
            measured = run_unit(unit, policy, lm, record.recipe, ranks)
            if measured is None or store is None:
                continue  # gathered by the first process
            result, samples = measured
            seconds = round(time.monotonic() - started, 3)
            record.seconds[f"{policy.label}/{unit.name}"] = seconds
            store.save(policy.label, unit.name, result, samples)
            record.results.append(result)
            write(store.folder / RESULTS, to_json(record.report()))
            console.detail(f"{unit.name} {policy.label}: {_brief(result)}")
            if number + 1 == len(plan) or plan[number + 1][0] is not unit:
                lm.forget_encodings()


def _brief(result: dict[str, Any]) -> str:
    value = result["metrics"][result["primary"]]["value"]
    return f"{result['primary']} {value:.4g}"


def check_policies(model: Any, policies: Sequence[Policy], max_length: int) -> dict[str, Any]:
    """Soundness of the model at each of its own budgets; {} for a dense model.

    Raises:
        SparsekError: a budget that does not fit, or a model whose numbers would mean nothing.
    """
    from sparsek_cli.evaluation.lm.soundness import check_soundness

    checks = {}
    for policy in policies:
        with policy.applied(model):
            if policy.name == OWN:
                checks[policy.label] = check_soundness(model, limit=max_length)
    return checks
