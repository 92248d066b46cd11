"""What an evaluation will measure, checked before a model is loaded for it."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsek_cli import hub
from sparsek_cli.disk import check_name
from sparsek_cli.errors import UsageError
from sparsek_cli.evaluation.policies.registry import check_names
from sparsek_cli.evaluation.result_files import RUNS
from sparsek_cli.evaluation.result_folder import check_part, check_results
from sparsek_cli.evaluation.settings import (
    Loading,
    Prompts,
    Rivals,
    Samples,
    loading_of,
    prompts_of,
    rivals_of,
    samples_of,
)
from sparsek_cli.evaluation.tasks.catalogue import Entry, check_counted, check_limits, expand
from sparsek_cli.evaluation.tasks.local_files import data_fingerprint
from sparsek_cli.output.place import check_local, check_not_inside

if TYPE_CHECKING:
    from sparsek_cli.recipes.schema_evaluate import EvaluateRecipe


@dataclass(frozen=True)
class Plan:
    """An evaluation that has been checked.

    Attributes:
        request: the recipe as plain data, for the record.
        checkpoint: what is measured. entries: the tasks, groups expanded.
        loading, rivals, samples, prompts: the request in parts.
        files: name, size and time of change of every local file it may read.
        out: the result folder; None: named after model and settings. overwrite: it is replaced.
        resume: whether results of an interrupted run with the same settings are kept.
    """

    request: dict[str, Any]
    checkpoint: hub.Checkpoint
    entries: list[Entry]
    files: list[tuple[str, int, int]]
    loading: Loading
    rivals: Rivals
    samples: Samples
    prompts: Prompts
    overwrite: bool = False
    out: Path | None = None
    resume: bool = False

    def data(self) -> dict[str, Any]:
        """For --json."""
        return {"recipe": self.request, "tasks": [e.name for e in self.entries]}

    def text(self) -> str:
        """For a person."""
        lengths = ", ".join(f"{n:,}" for n in self.samples.lengths) or "each task's own"
        whole = [entry.name for entry in self.entries if not entry.lengths]
        if whole and self.samples.lengths:
            lengths += f"; as long as the data: {', '.join(whole)}"
        budgets = ", ".join(map(str, self.rivals.budgets)) or "the checkpoint's own"
        samples = [f"{self.samples.limit or 'all'} per task and length"]
        samples += [
            f"{self.samples.limits[entry.name]} of {entry.name}"
            for entry in self.entries
            if entry.name in self.samples.limits
        ]
        return "\n".join(
            [
                f"model      {self.checkpoint.path}",
                f"tasks      {', '.join(entry.name for entry in self.entries)}",
                f"lengths    {lengths}",
                f"baselines  {', '.join(self.rivals.baselines) or 'none'}",
                f"budgets    {budgets}",
                f"samples    {', '.join(samples)}",
                f"out        {self.out or RUNS / self.checkpoint.name / '<settings>'}",
            ]
        )


def plan(recipe: "EvaluateRecipe", *, resume: bool = False) -> Plan:
    """Checks a request: names of tasks and baselines, the model, local data.

    Args:
        recipe: validated.
        resume: keep what an interrupted run with the same settings finished.

    Raises:
        UsageError: something in it does not exist.
    """
    entries = expand(recipe.tasks)
    check_limits(recipe.limits, entries)
    check_counted(recipe.lengths, recipe.text, entries)
    check_names(recipe.baselines)
    if recipe.model is None:
        raise UsageError("MODEL is missing", hint="name a folder, short name or hub id")
    checkpoint = hub.resolve(recipe.model, recipe.revision)
    if recipe.data is not None:
        check_name(recipe.data)
    if recipe.out is not None:
        check_local(recipe.out)
    out = None if recipe.out is None else Path(os.path.expanduser(recipe.out))
    if out is None and not resume:
        check_not_inside(RUNS, checkpoint.path, "--out")
    if out is not None:
        check_results(out, resume=resume, model=checkpoint.path)
        if recipe.overwrite:
            check_part(out)
    files = data_fingerprint(recipe.text, recipe.data)
    return Plan(
        request=recipe.model_dump(),
        checkpoint=checkpoint,
        entries=entries,
        files=files,
        loading=loading_of(recipe),
        rivals=rivals_of(recipe),
        samples=samples_of(recipe),
        prompts=prompts_of(recipe),
        overwrite=recipe.overwrite,
        out=out,
        resume=resume,
    )
