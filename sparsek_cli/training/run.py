"""`sparsek finetune` from recipe to finished folder."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparsek_cli import hub
from sparsek_cli.data.mixture import build_mixture, held_out_sequences, load_texts
from sparsek_cli.data.streams import STREAMS, stream_tokenizer
from sparsek_cli.devices import choose_device
from sparsek_cli.errors import SparsekError, UsageError
from sparsek_cli.models.proof import check_calls, counted_calls
from sparsek_cli.output import leftovers
from sparsek_cli.short_names import BUNDLED, SHORT_NAMES
from sparsek_cli.training.assemble import held_out_questions, load, make_trainer
from sparsek_cli.training.model import load_tokenizer, random_config
from sparsek_cli.training.objectives import detach
from sparsek_cli.training.output import check_room, write_model
from sparsek_cli.training.parameters import choose_parameters, is_sparse
from sparsek_cli.training.plan import TrainingPlan, make_plan
from sparsek_cli.training.progress import Report, Silent
from sparsek_cli.training.sharding import check_launch
from sparsek_cli.training.trainer import SparsekTrainer
from sparsek_cli.training.unfinished import (
    begun,
    check_output,
    checkpoint_to_resume,
    leave,
    part_folder,
)

if TYPE_CHECKING:
    from sparsek_cli.recipes.schema_finetune import FinetuneRecipe


@dataclass(frozen=True)
class TrainingResult:
    """What a finished run reports.

    Attributes:
        output: the model's folder.
        steps: optimiser steps done, resumed ones included.
        loss: training loss of the last step.
        start_loss, held_out_loss: held-out loss per token (nats) before and after; None if not
            measured.
        answer_loss: held-out loss per ANSWER token after the run, where there are any.
        start_recall, held_out_recall: share of the held-out questions that were answered.
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
    answer_loss: float | None = None
    start_recall: float | None = None
    held_out_recall: float | None = None


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
    output = Path(os.path.expanduser(recipe.out))
    first = os.environ.get("RANK", "0") == "0"
    source = None if recipe.model is None else hub.resolve(recipe.model)
    if not dry_run:
        if first:
            leftovers.clear(output, report.say)
        where = None if source is None else source.path
        check_output(output, resume=resume, overwrite=overwrite, model=where)
    _check_reporters(recipe)
    device = choose_device(recipe.device)
    check_launch(recipe, cpu=device.type == "cpu")
    bf16 = _wants_bf16(recipe, device)
    tokenizer = _tokenizer(recipe, source)
    texts, held_out = load_texts(recipe, tokenizer, report.say)
    # From here on a few words at a time are tokenised, in forked data workers, which would wait
    # for ever for the threads of their parent.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    name = source.name if source else f"{recipe.architecture.type} (random)"

    if dry_run:
        model = _model_without_weights(recipe, tokenizer, source)
        choose_parameters(model, recipe)
        return make_plan(recipe, model, texts, name=name, output=output, bf16=bf16)

    model, tuner, dtype = load(recipe, tokenizer, source, bf16)
    _check_dense(recipe, model)
    questions = held_out_questions(recipe, held_out, tokenizer)
    plan = make_plan(recipe, model, texts, name=name, output=output, bf16=bf16)
    report.say(plan.text())
    check_room(recipe, plan, dtype)
    part = part_folder(output)
    checkpoint = checkpoint_to_resume(recipe, part) if resume else None
    with begun(recipe, part, resume=resume), _kept_on_failure(part, report):
        trainer = make_trainer(
            recipe, model, tuner, plan, device, part,
            data=build_mixture(recipe, texts, tokenizer, plan.steps * recipe.batch_size),
            held_out=held_out_sequences(recipe, held_out, tokenizer), questions=questions,
            resumed=resume, report=report,
        )  # fmt: skip
        result = _train(trainer, plan, checkpoint, report)
        state = trainer.full_state()
        if trainer.is_world_process_zero():
            model = trainer.accelerator.unwrap_model(trainer.model)
            detach(model)
            if tuner is not None:
                model = tuner.merge_and_unload()
            write_model(
                model, tokenizer, output,
                recipe=recipe, result=result, dtype=dtype, base=source, state=state, name=name,
                overwrite=overwrite, report=report,
            )  # fmt: skip
            shutil.rmtree(part, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    return result


@contextmanager
def _kept_on_failure(part: Path, report: Report) -> Iterator[None]:
    """What can be resumed stays when the block fails, and is named."""
    try:
        yield
    except BaseException:
        kept = leave(part) if os.environ.get("RANK", "0") == "0" else None
        if kept is not None:
            report.say(f"stopped; {kept} is kept, --resume continues from it")
        raise


def _train(
    trainer: SparsekTrainer, plan: TrainingPlan, checkpoint: Path | None, report: Report
) -> TrainingResult:
    """Runs to the end; the better of start and end is then in the model."""
    on_gpu = trainer.args.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    try:
        with counted_calls() as calls:
            done = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except torch.OutOfMemoryError as error:
        raise SparsekError(
            "the GPU is out of memory",
            hint="set checkpointing=true, or lower micro_batch_size, sequence_length or loss_chunk",
        ) from error
    trainer.stop_if_not_finite()
    resumed_at = int(checkpoint.name.rsplit("-", 1)[1]) if checkpoint else 0
    if trainer.state.global_step > resumed_at:
        check_calls(trainer.accelerator.unwrap_model(trainer.model), calls, "finetune")
    end = {} if trainer.eval_dataset is None else _last_evaluation(trainer)
    start = _first_evaluation(trainer.state.log_history)
    kept = "end"
    worse = _what_got_worse(start, end) if trainer.start is not None else None
    if worse:
        trainer.put_back_start()
        kept, end = "start", start
        report.say(f"{worse}: the scorers it started with are kept (keep_better)")
    tokens = (trainer.state.global_step - resumed_at) * plan.tokens_per_step
    return TrainingResult(
        output=plan.output,
        steps=trainer.state.global_step,
        loss=trainer.final_loss(),
        start_loss=start.get("eval_loss"),
        held_out_loss=end.get("eval_loss"),
        kept=kept,
        tokens_per_second=tokens / max(done.metrics.get("train_runtime", 0.0), 1e-9),
        peak_gib=torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
        answer_loss=end.get("eval_answer_loss"),
        start_recall=start.get("eval_recall"),
        held_out_recall=end.get("eval_recall"),
    )


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


def _tokenizer(recipe: "FinetuneRecipe", source: hub.Checkpoint | None) -> Any:
    if recipe.tokenizer in STREAMS:
        return stream_tokenizer(recipe.tokenizer)
    return load_tokenizer(_tokenizer_place(recipe, source))


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


def _check_reporters(recipe: "FinetuneRecipe") -> None:
    packages = {"tensorboard": ("tensorboard", "tensorboardX")}
    for name in recipe.report_to:
        if not any(find_spec(package) for package in packages.get(name, (name,))):
            raise UsageError(
                f"report_to: {name} is not installed", hint=f"`pip install {name}`, or leave it out"
            )


def _check_dense(recipe: "FinetuneRecipe", model: Any) -> None:
    """Raises UsageError where a dense model is asked for what only SparseK models have."""
    if is_sparse(model):
        return
    wanted = recipe.objective
    if wanted.distill or wanted.future:
        raise UsageError(
            "a dense model is its own teacher: nothing to distill",
            hint="set objective.distill=0 and objective.future=0, or train a converted model",
        )
    if recipe.budget_stages:
        raise UsageError(
            "budget_stages needs a SparseK model: a dense one sees every key",
            hint="leave budget_stages out, or train a converted model",
        )


def _wants_bf16(recipe: "FinetuneRecipe", device: torch.device) -> bool:
    if recipe.precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return recipe.precision == "bf16"


def _first_evaluation(history: list[dict]) -> dict[str, float]:
    starts = [e for e in history if "eval_loss" in e and e.get("step") == 0]
    return starts[0] if starts else {}


def _last_evaluation(trainer: SparsekTrainer) -> dict[str, float]:
    """What is measured of the finished model, now unless it just was."""
    for entry in reversed(trainer.state.log_history):
        if "eval_loss" in entry and entry["step"] == trainer.state.global_step:
            return entry
    return trainer.evaluate()


def _what_got_worse(start: dict[str, float], end: dict[str, float]) -> str | None:
    """Loss, recall or neither, in words."""
    if not start:
        return None
    if not end["eval_loss"] <= start["eval_loss"]:
        return f"held-out loss rose from {start['eval_loss']:.4f} to {end['eval_loss']:.4f}"
    if end.get("eval_recall", 0) < start.get("eval_recall", 0):
        return f"held-out recall fell from {start['eval_recall']:.1%} to {end['eval_recall']:.1%}"
    return None
