"""What results.json says about a run: settings, versions, revision, and the reports made of it."""

import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsek_cli.disk import write_atomically
from sparsek_cli.evaluation.json_values import digest
from sparsek_cli.evaluation.policies.policy import Policy
from sparsek_cli.evaluation.report.retrieval import unanswered_by_dense
from sparsek_cli.evaluation.result_files import RUNS, folder_name
from sparsek_cli.evaluation.tasks.local_files import as_they_are
from sparsek_cli.families.varying_positions import in_words
from sparsek_cli.output.tokenizer_files import files_in

if TYPE_CHECKING:
    from sparsek_cli.hub import Checkpoint

# What results mean. Raise it with every change of the code that changes what is measured
# (positions, budgets, prompts, scores): no unfinished run from before is then gone on with.
MEANING = 4
PACKAGES = ("sparsek", "torch", "transformers", "lm_eval", "datasets", "triton", "numpy")


@dataclass
class Record:
    """One run: what was asked for and found out before, and its results so far.

    Attributes:
        request: the recipe as plain data. checkpoint, model, policies: what is measured.
        settings: everything that the numbers depend on, see `settings_of`.
        soundness: what the checks on the model found. absent: what is not measured, and why.
        planned: how many results make the run complete.
        results, seconds: what `run_unit` returned, in order, and how long each took.
    """

    request: dict[str, Any]
    checkpoint: "Checkpoint"
    model: Any
    settings: dict[str, Any]
    policies: Sequence[Policy]
    soundness: dict[str, Any]
    absent: Sequence[Any]
    planned: int
    results: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def report(self) -> dict[str, Any]:
        """What results.json holds, whole or so far."""
        import torch

        model, settings = self.model, self.settings
        gpu = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else None
        return {
            "format": 1,
            "model": {
                "name": self.checkpoint.name,
                "source": self.checkpoint.source,
                "path": str(self.checkpoint.path),
                "type": model.config.model_type,
                "parameters": model.num_parameters(),
                "sparsek": getattr(model.config, "sparsek", None),
                "positions": in_words(model.config),
            },
            "recipe": _without(self.request, "overwrite"),
            "fingerprint": digest(settings),
            "meaning": settings["meaning"],
            "max_length": settings["max_length"],
            "environment": {
                "versions": settings["versions"],
                "git": _git_revision(),
                "python": platform.python_version(),
                "platform": platform.platform(),
                "device": gpu or platform.processor() or "cpu",
                "dtype": settings["dtype"],
                "threads": torch.get_num_threads(),
            },
            "policies": [policy.label for policy in self.policies],
            "soundness": self.soundness,
            "units": self.results,
            "says_nothing": unanswered_by_dense(self.results),
            "absent": [item.as_dict() for item in self.absent],
            "complete": len(self.results) == self.planned,
            "timings": {"seconds": self.seconds},
        }


def settings_of(
    request: dict[str, Any],
    checkpoint: "Checkpoint",
    model: Any,
    max_length: int,
    files: Sequence,
) -> dict[str, Any]:
    """Everything the numbers depend on; its digest tells runs apart."""
    path = checkpoint.path
    weights = sorted(f for f in path.glob("*.safetensors") if f.is_file())
    # What makes tokens of texts, and says which tokens end an answer.
    beside = [*files_in(path), *filter(Path.is_file, [path / "generation_config.json"])]
    return {
        "recipe": _without(request, "out", "overwrite", "model"),
        "model": str(path),
        "weights": as_they_are(weights),
        "beside": as_they_are(beside),
        "config": model.config.to_dict(),
        "dtype": str(model.dtype),
        "device": model.device.type,
        "max_length": max_length,
        "data": files,
        "versions": _versions(),
        "meaning": MEANING,
    }


def _without(request: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in request.items() if key not in keys}


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@lru_cache(maxsize=1)
def _git_revision() -> str | None:
    """Revision of the checkout this runs from, "+" when it has changes; None outside one."""
    here = Path(__file__).parents[2]
    try:
        ask = {"cwd": here, "capture_output": True, "text": True, "timeout": 10, "check": True}
        revision = subprocess.run(["git", "rev-parse", "HEAD"], **ask).stdout.strip()
        dirty = subprocess.run(["git", "status", "--porcelain", "-uno", "."], **ask).stdout.strip()
        return revision + ("+" if dirty else "")
    except (OSError, subprocess.SubprocessError):
        return None


def default_folder(record: "Record") -> Path:
    """Where results go that no --out names: model, tasks and a digest of the settings."""
    asked = record.request
    parts = [
        "+".join(asked["tasks"]),
        "x".join(map(str, asked["lengths"])),
        f"limit{asked['limit']}" if asked["limit"] else "",
        "budgets" + "x".join(map(str, asked["budgets"])) if asked["budgets"] else "",
        digest(record.settings)[:6],
    ]
    return RUNS / folder_name([record.checkpoint.name]) / folder_name(parts)


def write_reports(folder: Path, report: dict[str, Any]) -> None:
    """The plots, report.md and report.html of a finished run."""
    from sparsek_cli.evaluation.report.html import page
    from sparsek_cli.evaluation.report.plots import write_plots
    from sparsek_cli.evaluation.report.table import markdown

    write_plots(folder, report)
    write_atomically(folder / "report.md", markdown(report))
    write_atomically(folder / "report.html", page(report))
