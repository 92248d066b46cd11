"""A planned evaluation, carried out: one task x length x policy at a time."""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparsek_cli.disk import is_full
from sparsek_cli.disk import write_atomically as write
from sparsek_cli.errors import SparsekError
from sparsek_cli.evaluation.json_values import digest, to_json
from sparsek_cli.evaluation.lm.soundness import check_policies
from sparsek_cli.evaluation.measure import run_unit
from sparsek_cli.evaluation.measured_model import measured_model
from sparsek_cli.evaluation.plan import Plan
from sparsek_cli.evaluation.policies.policy import Policy
from sparsek_cli.evaluation.policies.registry import DENSE, left_out, plan_policies
from sparsek_cli.evaluation.processes import Ranks
from sparsek_cli.evaluation.report import table
from sparsek_cli.evaluation.report.record import Record, default_folder, settings_of, write_reports
from sparsek_cli.evaluation.result_files import RESULTS, load_unit
from sparsek_cli.evaluation.result_folder import Store, working_folder
from sparsek_cli.evaluation.tasks.hub_data import without_hub
from sparsek_cli.evaluation.tasks.load_tasks import Unit, load_units, refuse_unfit
from sparsek_cli.evaluation.tasks.skipped import Absent, explained
from sparsek_cli.output import leftovers
from sparsek_cli.output.contents import RESULTS as RESULTS_FOLDER
from sparsek_cli.reporter import Reporter, Silent
from sparsek_cli.termination import note_resumable, sigterm_interrupts, sigterm_kills

Pair = tuple[Unit, Policy]


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation found.

    Attributes:
        report: what results.json holds, with `folder` added.
    """

    report: dict[str, Any]

    @property
    def out(self) -> str:
        """The result folder."""
        return self.report["folder"]

    def score(self, task: str, policy: str, length: int | None = None) -> float:
        """The task's main metric under a policy, both as the table names them.

        Raises:
            KeyError: that was not measured.
        """
        for unit in self.report["units"]:
            same = (unit["task"], unit["policy"]) == (task, policy)
            if same and length in (None, unit["length"]):
                return unit["metrics"][unit["primary"]]["value"]
        raise KeyError(f"{task} under {policy}")

    def data(self) -> dict[str, Any]:
        """For --json."""
        return self.report

    def text(self) -> str:
        """For a person: the table, and where everything is."""
        return f"{table.text(self.report)}\n\nresults: {self.out}"


@sigterm_interrupts()
def run(plan: Plan, reporter: Reporter | None = None) -> Evaluated:
    """Measures everything that is planned and writes the result folder."""
    with without_hub(plan.entries, plan.samples.data):
        return _run(plan, reporter or Silent())


def _run(plan: Plan, reporter: Reporter) -> Evaluated:
    ranks = Ranks(plan.loading.device, reporter.say)
    if not ranks.first:
        reporter = Silent()
        sigterm_kills()  # the others end it where it waits for them, and it has nothing to tidy
    say = reporter.say
    checkpoint, rivals, samples, prompts = plan.checkpoint, plan.rivals, plan.samples, plan.prompts
    measured = measured_model(
        checkpoint,
        replace(plan.loading, device=ranks.device(plan.loading.device)),
        prompts,
        sparse=bool(set(rivals.baselines) - {DENSE}),
        say=say,
    )
    model, lm, max_length = measured.model, measured.lm, measured.max_length
    policies = plan_policies(model, rivals.baselines, rivals.budgets, rivals.seed, own=measured.own)
    if not measured.own:
        rows = ", ".join(policy.label for policy in policies)
        say(f"{checkpoint.name} is not converted, so it has no scores: rows are {rows}")
    say(f"preparing {', '.join(plan.request['tasks'])}")
    units, absent = load_units(
        plan.entries,
        samples,
        tokenizer=measured.tokenizer,
        tokenizer_path=str(checkpoint.path),
        max_length=max_length,
        asked_length=prompts.max_length,
        beyond=measured.beyond,
    )
    units, refused = refuse_unfit(units, lm, samples, prompts, measured.beyond, ranks.count)
    pairs, unfit = _pairs(units, policies)
    unlike = left_out(model, rivals.baselines, rivals.budgets, own=measured.own)
    absent += [*refused, *unfit, *unlike]
    for lines, remedy in explained(absent):
        for line in lines:
            say(f"not measured: {line}")
        say(f"hint: {remedy}")
    record = Record(
        plan.request,
        checkpoint,
        model,
        settings_of(plan.request, checkpoint, model, max_length, plan.files),
        policies,
        check_policies(model, policies, max_length),
        absent,
        planned=len(pairs),
    )
    folder = plan.out or default_folder(record)
    store = None
    if ranks.first:
        leftovers.clear(folder, say, RESULTS_FOLDER)
        fingerprint = digest(record.settings)
        store = Store(
            folder, fingerprint, record.settings, resume=plan.resume, overwrite=plan.overwrite
        )
    with store or nullcontext():
        ranks.wait()  # for the folder; and again before the first result is written into it
        out, folder = folder, working_folder(folder, digest(record.settings))
        finished = _finished(folder, pairs) if plan.resume else {}
        if finished:
            say(f"resuming: {len(finished)} of {len(pairs)} results are in {folder}")
        ranks.wait()
        ranks.join(lm)
        try:
            _measure(pairs, finished, lm, plan, record, store, ranks, reporter)
            if ranks.first:
                _write(store.folder, record)
                store.complete()
        except KeyboardInterrupt:
            if ranks.first:
                _write(store.folder, record)
            if _stays(store):
                note_resumable()
            say(f"stopped; {_what_stays(store, out)}")
            raise
        except OSError as error:
            if not is_full(error):
                raise
            raise SparsekError(
                f"the disk is full; {_what_stays(store, out)}",
                hint="free some space, then "
                + ("go on with --resume" if _stays(store) else "start again"),
            ) from error
    return Evaluated(record.report() | {"folder": str(out)})


def _stays(store: Store | None) -> bool:
    """Whether --resume finds something; processes that have no store do not know."""
    return store is None or store.resumable()


def _what_stays(store: Store | None, out: Path) -> str:
    """Of a run that is not finished, in words."""
    if _stays(store):
        return f"what is finished is in {store.folder if store else out}: go on with --resume"
    return f"nothing was finished, and {out} is as it was"


def _write(folder: Path, record: Record) -> None:
    """results.json and the reports of what there is."""
    report = record.report()
    write(folder / RESULTS, to_json(report))
    if report["units"]:
        write_reports(folder, report)


def _pairs(units: Sequence[Unit], policies: Sequence[Policy]) -> tuple[list[Pair], list[Absent]]:
    """What is measured, in order, and which tasks a policy cannot be measured on."""
    pairs, unfit = [], []
    for unit in units:
        for policy in policies:
            reason = policy.unfit_for(unit.task)
            if reason is None:
                pairs.append((unit, policy))
            else:
                name = f"{unit.name} under {policy.label}"
                unfit.append(Absent(name, reason, "window and random can be measured"))
    return pairs, unfit


def _finished(folder: Path, pairs: Sequence[Pair]) -> dict[tuple[str, str], dict[str, Any]]:
    """The stored results among what is planned."""
    found = {}
    for unit, policy in pairs:
        result = load_unit(folder, policy.label, unit.name)
        if result is not None:
            found[unit.name, policy.label] = result
    return found


def _measure(
    pairs: Sequence[Pair],
    finished: dict[tuple[str, str], dict[str, Any]],
    lm: Any,
    plan: Plan,
    record: Record,
    store: Store | None,
    ranks: Ranks,
    reporter: Reporter,
) -> None:
    """Measures what is not finished; every result is on disk before the next one begins."""
    total = sum(
        len(unit.task.instances)
        for unit, policy in pairs
        if (unit.name, policy.label) not in finished
    )
    with reporter.progress("evaluating", total=total) as bar:
        lm.advance = bar.advance
        for number, (unit, policy) in enumerate(pairs):
            done = finished.get((unit.name, policy.label))
            if done is not None:
                record.results.append(done)
                continue
            bar.describe(f"{unit.name} {policy.label}")
            started = time.monotonic()
            measured = run_unit(
                unit, policy, lm, ranks,
                limit=plan.samples.limit_of(unit.entry.name),
                fills_batches=plan.prompts.batch_size is None,
            )  # fmt: skip
            if measured is None or store is None:
                continue  # gathered by the first process
            result, samples = measured
            seconds = round(time.monotonic() - started, 3)
            record.seconds[f"{policy.label}/{unit.name}"] = seconds
            store.save(policy.label, unit.name, result, samples)
            record.results.append(result)
            write(store.folder / RESULTS, to_json(record.report()))
            reporter.detail(f"{unit.name} {policy.label}: {_brief(result)}")
            if number + 1 == len(pairs) or pairs[number + 1][0] is not unit:
                lm.forget_encodings()


def _brief(result: dict[str, Any]) -> str:
    value = result["metrics"][result["primary"]]["value"]
    return f"{result['primary']} {value:.4g}"
