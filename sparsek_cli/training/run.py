"""`sparsek finetune` from recipe to finished folder."""

import gc
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from sparsek_cli import hub
from sparsek_cli.data.mixture import HeldOut, build_mixture, load_texts
from sparsek_cli.devices import choose_device
from sparsek_cli.errors import SparsekError, UsageError
from sparsek_cli.short_names import BUNDLED, SHORT_NAMES
from sparsek_cli.training import checkpoints
from sparsek_cli.training.model import (
    build_random,
    load_pretrained,
    load_tokenizer,
    random_config,
    teacher_context,
)
from sparsek_cli.training.objectives import Objective, attach, decoder_of, detach
from sparsek_cli.training.output import write_model
from sparsek_cli.training.parameters import choose_parameters, is_sparse, trained_state
from sparsek_cli.training.plan import TrainingPlan, make_plan
from sparsek_cli.training.progress import ProgressReport, Report, Silent
from sparsek_cli.training.trainer import SparsekTrainer, training_arguments

if TYPE_CHECKING:
    from sparsek_cli.recipes.schema_finetune import FinetuneRecipe

# What may differ between a run and its continuation.
_FREE = {"save_steps", "keep_checkpoints", "log_steps", "report_to", "data_workers", "device",
         "out", "compile", "checkpointing", "loss_chunk"}  # fmt: skip


@dataclass(frozen=True)
class TrainingResult:
    """What a finished run reports.

    Attributes:
        output: the model's folder.
        steps: optimiser steps done, resumed ones included.
        loss: training loss of the last step.
        start_loss, held_out_loss: held-out loss per token (nats) before and after; None if not
            measured.
        kept: "end", or "start" when training made scorers worse and the start was kept.
        tokens_per_second: of this process group, over the steps of this call.
        peak_gib: peak GPU memory of the first process; None on the CPU.
    """

    output: str
    steps: int
    loss: float
    start_loss: float | None
    held_out_loss: float | None
    kept: str
    tokens_per_second: float
    peak_gib: float | None


def part_folder(output: Path) -> Path:
    """Where a run lives until it is finished."""
    return output.with_name(output.name + ".part")


def finetune(
    recipe: "FinetuneRecipe",
    *,
    dry_run: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    report: Report | None = None,
) -> TrainingPlan | TrainingResult:
    """Trains what the recipe says and writes a complete model folder.

    Args:
        recipe: validated; `out` is set, `model` too unless init is random.
        dry_run: return the plan, train nothing.
        resume: continue from the newest checkpoint of an unfinished run of the same recipe.
        overwrite: replace the output folder, and forget an unfinished run.
        report: where progress goes.

    Raises:
        UsageError: the request cannot be carried out as written.
        SparsekError: it was tried and failed; checkpoints stay for `resume`.
    """
    report = report or Silent()
    output = Path(recipe.out).expanduser()
    part = part_folder(output)
    if not dry_run:
        _check_output(output, part, resume=resume, overwrite=overwrite)
    device = choose_device(recipe.device)
    bf16 = _wants_bf16(recipe, device)
    source = None if recipe.model is None else hub.resolve(recipe.model)
    tokenizer = load_tokenizer(_tokenizer_place(recipe, source))
    texts, held_out = load_texts(recipe, tokenizer, report.say)
    # From here on a few words at a time are tokenised, in forked data workers, which would wait
    # for ever for the threads of their parent.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    name = source.name if source else f"{recipe.architecture.type} (random)"

    if dry_run:
        model = _model_without_weights(recipe, tokenizer, source)
        choose_parameters(model, recipe)
        return make_plan(recipe, model, texts, name=name, output=output, bf16=bf16)

    model, tuner, dtype = _load(recipe, tokenizer, source, bf16)
    plan = make_plan(recipe, model, texts, name=name, output=output, bf16=bf16)
    report.say(plan.text())
    data = build_mixture(recipe, texts, tokenizer, plan.steps * recipe.batch_size)
    evaluation = None
    if held_out is not None:
        count = recipe.evaluation.sequences
        evaluation = HeldOut(held_out, recipe.sequence_length, count, recipe.seed)
    objective = Objective(
        **recipe.objective.model_dump(),
        loss_chunk=recipe.loss_chunk,
    )
    if recipe.objective.distill > 0 and not is_sparse(model):
        raise UsageError(
            "a dense model is its own teacher: nothing to distill",
            hint="set objective.distill=0, or train a converted model",
        )
    start = trained_state(model) if _compares(recipe, evaluation) else None
    args = training_arguments(
        recipe, part, steps=plan.steps, bf16=bf16, cpu=device.type == "cpu",
        processes=plan.processes,
    )  # fmt: skip
    checkpoint = _checkpoint(recipe, part, resume)
    args.eval_on_start = start is not None and checkpoint is None
    if recipe.checkpointing:
        # The first name is newer than the oldest transformers supported here.
        newer = getattr(model, "activation_checkpointing_enable", None)
        (newer or model.gradient_checkpointing_enable)({"use_reentrant": False})
    if recipe.compile:
        decoder_of(model).compile()
    attach(model, objective, teacher_context(model, tuner))
    progress = ProgressReport(report, plan.tokens_per_step)
    trainer = SparsekTrainer(
        recipe=recipe,
        objective=objective,
        model=model,
        args=args,
        train_dataset=data,
        eval_dataset=evaluation,
        callbacks=[progress],
    )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    _begin(recipe, part, trainer)
    try:
        done = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        trainer.stop_if_not_finite()
    except (KeyboardInterrupt, SparsekError):
        _leave(part, trainer, report)
        raise
    except torch.OutOfMemoryError as error:
        _leave(part, trainer, report)
        raise SparsekError(
            "the GPU is out of memory",
            hint="set checkpointing=true, or lower micro_batch_size, sequence_length or loss_chunk",
        ) from error
    held = _last_evaluation(trainer) if evaluation is not None else None
    before = _first_evaluation(trainer.state.log_history)
    kept = "end"
    if start is not None and before is not None and held > before:
        kept = "start"
        report.say(
            f"held-out loss rose from {before:.4f} to {held:.4f}: the scorers it started with "
            "are kept (keep_better)"
        )
        with torch.no_grad():
            for key, tensor in start.items():
                model.get_parameter(key).copy_(tensor)
        held = before
    seconds = done.metrics.get("train_runtime", 0.0)
    resumed_at = int(checkpoint.name.rsplit("-", 1)[1]) if checkpoint else 0
    steps_here = trainer.state.global_step - resumed_at
    result = TrainingResult(
        output=str(output),
        steps=trainer.state.global_step,
        loss=trainer.final_loss(),
        start_loss=before,
        held_out_loss=held,
        kept=kept,
        tokens_per_second=steps_here * plan.tokens_per_step / max(seconds, 1e-9),
        peak_gib=torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
    )
    state = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
    if trainer.is_world_process_zero():
        model = trainer.accelerator.unwrap_model(trainer.model)
        detach(model)
        if tuner is not None:
            model = tuner.merge_and_unload()
        write_model(
            model, tokenizer, output,
            recipe=recipe, result=result, dtype=dtype, base=source, state=state, name=name,
        )  # fmt: skip
        shutil.rmtree(part, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    return result


def _load(
    recipe: "FinetuneRecipe", tokenizer: Any, source: hub.Checkpoint | None, bf16: bool
) -> tuple[Any, Any, torch.dtype]:
    """Model with its learning parameters chosen, LoRA's tuner if any, and the dtype to save in."""
    if recipe.init == "random":
        model = build_random(recipe, tokenizer)
        stored = torch.bfloat16 if bf16 else torch.float32
    else:
        kept = source.config()
        stored = getattr(torch, kept.get("dtype") or kept.get("torch_dtype") or "float32")
        # What is frozen stays as it is stored; what learns all over needs float32 masters.
        loaded = torch.float32 if recipe.train == "all" or not bf16 else torch.bfloat16
        model = load_pretrained(source.path, recipe, loaded)
    if recipe.save_dtype != "auto":
        stored = {"bf16": torch.bfloat16, "fp32": torch.float32}[recipe.save_dtype]
    return model, choose_parameters(model, recipe), stored


def _model_without_weights(
    recipe: "FinetuneRecipe", tokenizer: Any, source: hub.Checkpoint | None
) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    import sparsek_cli.models  # noqa: F401  (registers our families)

    if recipe.init == "random":
        config = random_config(recipe, tokenizer)
    else:
        config = AutoConfig.from_pretrained(source.path)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _tokenizer_place(recipe: "FinetuneRecipe", source: hub.Checkpoint | None) -> str | Path:
    """A folder or hub id; of a hub model only the tokenizer's files are fetched."""
    name = recipe.tokenizer
    if name is None:
        if source is None:
            raise UsageError(
                "init: random needs a tokenizer",
                hint="set 'tokenizer' (a folder, short name or hub id) or 'model'",
            )
        return source.path
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name in BUNDLED:
        return hub.bundled(name).path
    return SHORT_NAMES[name].hub_id if name in SHORT_NAMES else name


def _wants_bf16(recipe: "FinetuneRecipe", device: torch.device) -> bool:
    if recipe.precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return recipe.precision == "bf16"


def _compares(recipe: "FinetuneRecipe", evaluation: Any) -> bool:
    return recipe.train == "scorers" and recipe.keep_better and evaluation is not None


def _first_evaluation(history: list[dict]) -> float | None:
    starts = [e["eval_loss"] for e in history if "eval_loss" in e and e.get("step") == 0]
    return starts[0] if starts else None


def _last_evaluation(trainer: SparsekTrainer) -> float:
    """Held-out loss of the finished model, measured now unless it just was."""
    for entry in reversed(trainer.state.log_history):
        if "eval_loss" in entry and entry["step"] == trainer.state.global_step:
            return entry["eval_loss"]
    return trainer.evaluate()["eval_loss"]


def _check_output(output: Path, part: Path, *, resume: bool, overwrite: bool) -> None:
    if output.exists() and not overwrite:
        raise UsageError(
            f"'{output}' exists", hint="choose another OUT, or add --overwrite to replace it"
        )
    unfinished = checkpoints.checkpoints_in(part)
    if resume and not unfinished:
        raise UsageError(
            f"nothing to resume: {part} holds no checkpoint",
            hint="start without --resume, and set save_steps to have checkpoints",
        )
    if unfinished and not resume and not overwrite:
        raise UsageError(
            f"an unfinished run is in {part}",
            hint="--resume continues it, --overwrite starts over",
        )


def _checkpoint(recipe: "FinetuneRecipe", part: Path, resume: bool) -> Path | None:
    if not resume:
        return None
    before = yaml.safe_load((part / "recipe.yaml").read_text(encoding="utf-8"))
    now = recipe.model_dump(mode="json")
    for key in now:
        if key not in _FREE and before.get(key) != now[key]:
            raise UsageError(
                f"the unfinished run has {key} {before.get(key)!r}, now it is {now[key]!r}",
                hint="resume with the same recipe, or --overwrite to start over",
            )
    return checkpoints.checkpoints_in(part)[-1]


def _begin(recipe: "FinetuneRecipe", part: Path, trainer: SparsekTrainer) -> None:
    if trainer.is_world_process_zero():
        resumed = bool(checkpoints.checkpoints_in(part)) and (part / "recipe.yaml").is_file()
        if not resumed or not trainer.args.eval_on_start:
            part.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
        (part / "recipe.yaml").write_text(text, encoding="utf-8")
    trainer.accelerator.wait_for_everyone()


def _leave(part: Path, trainer: SparsekTrainer, report: Report) -> None:
    """After a failure: keep what can be resumed, leave nothing else behind."""
    if not trainer.is_world_process_zero():
        return
    kept = checkpoints.checkpoints_in(part)
    if kept:
        report.say(f"stopped; {kept[-1].name} is in {part}, --resume continues from it")
    else:
        shutil.rmtree(part, ignore_errors=True)
    gc.collect()
