"""One evaluation from recipe to result folder: one task x length x policy at a time."""

import math
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsek_cli.errors import SparsekError
from sparsek_cli.evaluation import proof as proofs
from sparsek_cli.evaluation.catalogue import expand
from sparsek_cli.evaluation.policies import DENSE, OWN, Policy, plan_policies
from sparsek_cli.evaluation.ranks import Ranks
from sparsek_cli.evaluation.store import (
    RESULTS,
    Store,
    digest,
    folder_name,
    load_unit,
    to_json,
    write_atomically,
)
from sparsek_cli.evaluation.units import (
    Unit,
    build_requests,
    data_fingerprint,
    load_units,
    quiet_lm_eval,
    refuse_long,
)

if TYPE_CHECKING:
    from sparsek_cli.console import Console
    from sparsek_cli.hub import Checkpoint
    from sparsek_cli.recipes.schema_evaluate import EvaluateRecipe

PACKAGES = ("sparsek", "torch", "transformers", "lm_eval", "datasets", "triton", "numpy")
BATCH_TOKENS = {"cpu": 2048, "cuda": 65536}  # `batch_size: auto` fills a batch with about so many
MAX_BATCH = 64


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
        overwrite: replace a folder that holds results of other settings.

    Returns:
        What results.json holds, with `folder` added.
    """
    from sparsek_cli.last_model import model_or_default

    ranks = Ranks()
    say = console.say if ranks.first else _unheard
    entries = expand(recipe.tasks)
    checkpoint = model_or_default(recipe.model, recipe.revision, say=say)
    files = data_fingerprint(recipe)
    model, tokenizer, own = load_model(checkpoint, recipe, ranks.device(recipe.device))
    policies = plan_policies(model, recipe.baselines, recipe.budgets, recipe.seed, own=own)
    if not own:
        rows = ", ".join(policy.label for policy in policies)
        say(f"{checkpoint.name} is not converted, so it has no scores: rows are {rows}")
    max_length = recipe.max_length or _max_length(model, tokenizer)
    lm = _harness(model, tokenizer, recipe, max_length)
    say(f"preparing {', '.join(recipe.tasks)}")
    units, absent = load_units(
        entries,
        recipe,
        tokenizer=tokenizer,
        tokenizer_path=str(checkpoint.path),
        max_length=max_length,
        say=say,
    )
    units, refused = refuse_long(units, lm, recipe)
    for item in refused:
        say(f"refused {item.name}: {item.reason} ({item.remedy})")
    absent += refused
    checks = check_policies(model, policies, max_length)

    settings = _settings(recipe, checkpoint, model, max_length, files)
    folder = Path(recipe.output) if recipe.output else _default_folder(recipe, checkpoint, settings)
    store = None
    if ranks.first:
        store = Store(folder, digest(settings), resume=resume, overwrite=overwrite)
    plan = [(unit, policy) for unit in units for policy in policies]
    finished: dict[tuple[str, str], Any] = {}
    ranks.wait()  # for the folder; and again before the first result is written into it
    if resume:
        finished = {
            (unit.name, policy.label): load_unit(folder, policy.label, unit.name)
            for unit, policy in plan
        }
    ranks.wait()
    ranks.join(lm)
    results: list[dict[str, Any]] = []
    seconds: dict[str, float] = {}

    def write() -> dict[str, Any]:
        report = _report(
            recipe, checkpoint, model, settings, policies, checks, results, absent, seconds
        )
        report["complete"] = len(results) == len(plan)
        if ranks.first:
            write_atomically(folder / RESULTS, to_json(report))
        return report

    try:
        with console.progress("evaluating", total=_requests(units, policies)) as bar:
            lm.advance = bar.advance
            for unit, policy in plan:
                done = finished.get((unit.name, policy.label))
                if done is not None:
                    bar.advance(len(unit.task.instances))
                    results.append(done)
                    continue
                bar.describe(f"{unit.name} {policy.label}")
                started = time.monotonic()
                measured = run_unit(unit, policy, lm, recipe, ranks)
                if measured is None or store is None:
                    continue  # gathered by the first process
                result, samples = measured
                seconds[f"{policy.label}/{unit.name}"] = round(time.monotonic() - started, 3)
                store.save(policy.label, unit.name, result, samples)
                results.append(result)
                write()
                console.detail(f"{unit.name} {policy.label}: {_brief(result)}")
                if policy is policies[-1]:
                    lm.forget_encodings()
    except KeyboardInterrupt:
        write()
        say(f"stopped; what is finished is in {folder}: go on with --resume")
        raise
    report = write()
    if ranks.first:
        _write_reports(folder, report)
    return report | {"folder": str(folder)}


def _unheard(text: str) -> None:
    """What a process says that is not the first one."""


def _requests(units: Sequence[Unit], policies: Sequence[Policy]) -> int:
    return sum(len(unit.task.instances) for unit in units) * len(policies)


def check_policies(model: Any, policies: Sequence[Policy], max_length: int) -> dict[str, Any]:
    """Soundness of the model at each of its own budgets; {} for a dense model.

    Raises:
        SparsekError: a budget that does not fit, or a model whose numbers would mean nothing.
    """
    from sparsek_cli.evaluation.soundness import check_soundness

    checks = {}
    for policy in policies:
        with policy.applied(model):
            if policy.name == OWN:
                checks[policy.label] = check_soundness(model, limit=max_length)
    return checks


def load_model(
    checkpoint: "Checkpoint", recipe: "EvaluateRecipe", device: str
) -> tuple[Any, Any, bool]:
    """Model in eval mode on its device, tokenizer, and whether the model brings its own scores.

    A dense model of a supported family becomes a sparse one in memory when a baseline asks for it:
    windows and random pairs need no scores.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from sparsek_cli.devices import choose_device, choose_dtype
    from sparsek_cli.models import FAMILIES, family_of, sparsek_config_from

    where = choose_device(device)
    dtype = choose_dtype(recipe.dtype, where)
    try:
        config = AutoConfig.from_pretrained(checkpoint.path)
        own = getattr(config, "sparsek", None) is not None
        kind, options = AutoModelForCausalLM, {}
        if not own and config.model_type in FAMILIES and set(recipe.baselines) - {DENSE}:
            kind = family_of(config).sparsek_causal_lm
            options["config"] = sparsek_config_from(config, {})
        with quiet_lm_eval():  # scorers are missing there, and reported
            model = kind.from_pretrained(checkpoint.path, dtype=dtype, **options)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.path)
    except (OSError, ValueError, RuntimeError) as error:
        raise SparsekError(
            f"cannot load {checkpoint.name}: {str(error).strip().splitlines()[0]}",
            hint="check it with `sparsek doctor MODEL`, or convert it again",
        ) from error
    return model.to(where).eval(), tokenizer, own


def _harness(model: Any, tokenizer: Any, recipe: "EvaluateRecipe", max_length: int) -> Any:
    with quiet_lm_eval():
        from sparsek_cli.evaluation.harness import SparsekLM

        return SparsekLM(
            model,
            tokenizer,
            policy=Policy(DENSE),
            max_length=max_length,
            truncate=None if recipe.truncate == "refuse" else recipe.truncate,
            batch_size=1 if recipe.batch_size == "auto" else recipe.batch_size,
            share_prefix=recipe.share_prefix,
            max_new_tokens=recipe.max_new_tokens,
        )


def _max_length(model: Any, tokenizer: Any) -> int:
    from lm_eval.models.utils import resolve_max_length

    return resolve_max_length(model.config, tokenizer, default=2048)


def run_unit(
    unit: Unit, policy: Policy, lm: Any, recipe: "EvaluateRecipe", ranks: Ranks
) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
    """One task at one length under one policy.

    Returns:
        The unit's result, and one record per sample; None in all processes but the first.

    Raises:
        SparsekError: the policy's attention did not run (see proof.check).
    """
    from lm_eval.evaluator import evaluate as lm_eval_evaluate

    lm.policy, lm.proof = (
        policy,
        proofs.Proof(attention="dense" if not policy.sparse else "sparsek"),
    )
    if recipe.batch_size == "auto":
        lm.batch_size_per_gpu = _batch_size(unit, lm, recipe)
    with (
        quiet_lm_eval(),
        policy.applied(lm.model),
        proofs.watch_attention(lm.proof),
    ):
        raw = lm_eval_evaluate(
            lm,
            {"tasks": {unit.entry.name: unit.task}, "groups": {}, "group_map": {}},
            limit=recipe.limit_of(unit.entry.name),
            bootstrap_iters=100,
            apply_chat_template=unit.chat,
            fewshot_as_multiturn=unit.chat,
        )
    proof = ranks.add_up(lm)
    if raw is None:
        return None
    proofs.check(proof, sparse=policy.sparse, task=unit.name, policy=policy.label)
    samples = raw["samples"][unit.entry.name]
    result = {
        "task": unit.entry.name,
        "length": unit.length,
        "policy": policy.label,
        "budget": policy.budget,
        "metrics": _metrics(raw, unit, samples),
        "primary": unit.entry.metric,
        "samples": len({s["doc_id"] for s in samples}),
        "chat_template": unit.chat,
        "proof": proof.as_dict(),
    }
    result["primary"] = _primary(result)
    if unit.entry.name == "ppl":
        from sparsek_cli.evaluation.ppl import loss_by_position

        passages = [sample["resps"][0][0] for sample in samples]
        result["loss_by_position"] = loss_by_position(passages, unit.length)
    if samples and "depth" in samples[0]["doc"]:
        result["by_depth"] = [
            [s["doc"]["depth"], s[result["primary"]], s["doc"]["phrasing"]] for s in samples
        ]
    return result, [_sample(s) for s in samples]


def _batch_size(unit: Unit, lm: Any, recipe: "EvaluateRecipe") -> int:
    build_requests(unit, lm, recipe)
    _, longest = lm.over_limit(unit.task.instances)
    room = BATCH_TOKENS["cuda" if lm.device.type == "cuda" else "cpu"]
    return max(1, min(MAX_BATCH, room // max(1, longest)))


def _metrics(raw: dict, unit: Unit, samples: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """{metric: value, stderr, higher_is_better} as lm-eval gives them.

    Where lm-eval has no standard error (its corpus metrics), it is that of the mean of the metric
    over single samples.
    """
    name = unit.entry.name
    values = raw["results"][name]
    better = raw.get("higher_is_better", {}).get(name, {})
    aggregation = unit.task.aggregation()
    metrics = {}
    for key, value in values.items():
        metric, _, filtered = key.partition(",")
        if metric not in aggregation or not isinstance(value, int | float) or math.isnan(value):
            continue
        error = values.get(f"{metric}_stderr,{filtered}")
        if not isinstance(error, int | float):
            rows = [s[metric] for s in samples if metric in s and s["filter"] == filtered]
            error = _standard_error(rows, aggregation.get(metric))
        label = metric if filtered in ("none", "") else f"{metric},{filtered}"
        metrics[label] = {
            "value": value,
            "stderr": error,
            "higher_is_better": bool(better.get(metric, True)),
        }
    return metrics


def _standard_error(rows: list[Any], aggregate: Callable | None) -> float | None:
    """Standard error of the mean of `aggregate` over single rows, or None."""
    if len(rows) < 2 or aggregate is None:
        return None
    if hasattr(aggregate, "standard_error"):
        return aggregate.standard_error(rows)
    each = [aggregate([row]) for row in rows]
    mean = sum(each) / len(each)
    return math.sqrt(sum((x - mean) ** 2 for x in each) / (len(each) - 1) / len(each))


def _primary(result: dict[str, Any]) -> str:
    """The metric that stands for the task: the catalogue's, else the first one there is."""
    metrics = result["metrics"]
    named = [m for m in metrics if m.split(",")[0] == result["primary"]]
    return (named or list(metrics))[0]


def _sample(sample: dict[str, Any]) -> dict[str, Any]:
    """What is kept of one sample: documents are long and can be made again, so only their end."""
    doc = {k: v for k, v in sample["doc"].items() if not (isinstance(v, str) and len(v) > 500)}
    return {
        "doc_id": sample["doc_id"],
        "filter": sample["filter"],
        "doc": doc,
        "target": _short(sample["target"]),
        "prompt_end": str(sample["arguments"][0][0])[-300:],
        "prompt_hash": sample["prompt_hash"],
        "responses": [_short(r) for responses in sample["resps"] for r in responses],
        "scores": {metric: sample[metric] for metric in sample["metrics"]},
    }


def _short(value: Any) -> Any:
    return value if not isinstance(value, str) or len(value) <= 2000 else value[:2000] + "..."


def _settings(
    recipe: "EvaluateRecipe", checkpoint: "Checkpoint", model: Any, max_length: int, files: Sequence
) -> dict[str, Any]:
    """Everything the numbers depend on; its digest tells runs apart."""
    weights = sorted(checkpoint.path.glob("*.safetensors"))
    return {
        "recipe": recipe.model_dump(exclude={"output", "model"}),
        "model": str(checkpoint.path),
        "weights": [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in weights],
        "config": model.config.to_dict(),
        "dtype": str(model.dtype),
        "device": model.device.type,
        "max_length": max_length,
        "data": files,
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _git_revision() -> str | None:
    """Revision of the checkout this runs from, "+" when it has changes; None outside one."""
    here = Path(__file__).parent
    try:
        ask = {"cwd": here, "capture_output": True, "text": True, "timeout": 10, "check": True}
        revision = subprocess.run(["git", "rev-parse", "HEAD"], **ask).stdout.strip()
        dirty = subprocess.run(["git", "status", "--porcelain", "-uno", "."], **ask).stdout.strip()
        return revision + ("+" if dirty else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _default_folder(recipe: "EvaluateRecipe", checkpoint: "Checkpoint", settings: dict) -> Path:
    parts = [
        "+".join(recipe.tasks),
        "x".join(map(str, recipe.lengths)),
        f"limit{recipe.limit}" if recipe.limit else "",
        "budgets" + "x".join(map(str, recipe.budgets)) if recipe.budgets else "",
        digest(settings)[:6],
    ]
    return Path("runs") / "evaluate" / folder_name([checkpoint.name]) / folder_name(parts)


def _report(
    recipe: "EvaluateRecipe",
    checkpoint: "Checkpoint",
    model: Any,
    settings: dict[str, Any],
    policies: Sequence[Policy],
    checks: dict[str, Any],
    results: list[dict[str, Any]],
    absent: Sequence[Any],
    seconds: dict[str, float],
) -> dict[str, Any]:
    import torch

    gpu = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else None
    return {
        "format": 1,
        "model": {
            "name": checkpoint.name,
            "source": checkpoint.source,
            "path": str(checkpoint.path),
            "type": model.config.model_type,
            "parameters": model.num_parameters(),
            "sparsek": getattr(model.config, "sparsek", None),
        },
        "recipe": recipe.model_dump(),
        "fingerprint": digest(settings),
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
        "policies": [policy.label for policy in policies],
        "soundness": checks,
        "units": results,
        "absent": [item.as_dict() for item in absent],
        "timings": {"seconds": seconds},
    }


def _brief(result: dict[str, Any]) -> str:
    value = result["metrics"][result["primary"]]["value"]
    return f"{result['primary']} {value:.4g}"


def _write_reports(folder: Path, report: dict[str, Any]) -> None:
    from sparsek_cli.evaluation.html import page
    from sparsek_cli.evaluation.plots import write_plots
    from sparsek_cli.evaluation.table import markdown

    write_plots(folder, report)
    write_atomically(folder / "report.md", markdown(report))
    write_atomically(folder / "report.html", page(report))
