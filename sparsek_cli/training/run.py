"""A planned training run, carried out: the model is loaded, trained, and written in one rename."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sparsek_kernels import NoThreshold

from sparsek_cli.converted import is_converted
from sparsek_cli.devices import forget_stray_ranks, is_first, meet_others
from sparsek_cli.errors import SparsekError, UsageError
from sparsek_cli.families.layers import has_states
from sparsek_cli.models.proof import check_calls, counted_calls
from sparsek_cli.output import leftovers
from sparsek_cli.reporter import Reporter, Silent
from sparsek_cli.termination import note_resumable, sigterm_interrupts, sigterm_kills
from sparsek_cli.training.assemble import Learner, load, make_trainer
from sparsek_cli.training.datasets import make_datasets
from sparsek_cli.training.losses.objectives import detach
from sparsek_cli.training.plan import Plan
from sparsek_cli.training.progress import ProgressReport
from sparsek_cli.training.run_sizes import Sizes, counted_steps, sizes_of
from sparsek_cli.training.storage.checkpoints import checkpoints_in
from sparsek_cli.training.storage.damage import CannotResume
from sparsek_cli.training.storage.output import check_room, write_model
from sparsek_cli.training.storage.resume import begun, check_output, leave, part_folder, remove
from sparsek_cli.training.trainer import SparsekTrainer

if TYPE_CHECKING:
    from sparsek_cli.training.settings import Settings


@dataclass(frozen=True)
class Trained:
    """What a finished run reports.

    Attributes:
        out: the model's folder.
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

    out: str
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

    def data(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)

    def text(self) -> str:
        """For a person."""
        lines = [f"wrote {self.out}"]
        if self.held_out_loss is not None:
            before = "" if self.start_loss is None else f" (before: {self.start_loss:.4f})"
            lines.append(f"held-out loss {self.held_out_loss:.4f}{before}")
        if self.answer_loss is not None:
            lines.append(f"held-out loss of answers {self.answer_loss:.4f}")
        if self.held_out_recall is not None:
            before = "" if self.start_recall is None else f" (before: {self.start_recall:.1%})"
            lines.append(f"held-out recall {self.held_out_recall:.1%}{before}")
        if self.kept == "start":
            lines.append("training did not help: the scorers it started with were kept")
        steps = counted_steps(self.steps)
        lines.append(f"loss {self.loss:.4f} after {steps}, {self.tokens_per_second:,.0f} tokens/s")
        return "\n".join(lines)


@sigterm_interrupts()
def run(plan: Plan, reporter: Reporter | None = None) -> Trained:
    """Trains as planned and writes a complete model folder.

    Raises:
        SparsekError: it was tried and failed; checkpoints stay for `resume`.
    """
    reporter, settings, out = reporter or Silent(), plan.settings, plan.out
    start = settings.start
    forget_stray_ranks()
    meet_others(reporter.say)
    if is_first():
        leftovers.clear(out, reporter.say)
    else:
        sigterm_kills()  # the others end it where it waits for them, and it has nothing to tidy
    resumed, where = plan.checkpoint is not None, plan.source.path if plan.source else None
    check_output(  # it may be back
        out, resume=resumed, overwrite=settings.overwrite, model=where, contents=start.contents
    )
    learner = load(start, plan.tokenizer, plan.source, plan.bf16, plan.device)
    config = learner.model.config
    _check_dense(config, settings)
    # Counted again: attention settings of the recipe may have made scorers idle.
    sizes = sizes_of(learner.model, settings, plan.texts, plan.source, out, plan.bf16)
    data = make_datasets(
        settings, plan.texts, plan.held_out, plan.tokenizer,
        total=sizes.steps * sizes.batch.sequences,
        keeps_states=has_states(getattr(config, "layer_types", None)), say=reporter.say,
    )  # fmt: skip
    reporter.say(sizes.text())
    check_room(
        sizes, where, learner.dtype, checkpoints=1 if settings.rhythm.save else 0,
        adapters=learner.tuner is not None and not start.lora.merge,
    )  # fmt: skip
    part = part_folder(out)
    began = begun(plan.request, plan.inputs, part, resume=resumed)
    with began, _kept_on_failure(part, reporter):
        with reporter.progress("training", logged=True) as bar:
            trainer = make_trainer(
                learner, settings, sizes, data, device=plan.device, part=part, resumed=resumed,
                callbacks=[ProgressReport(reporter, bar, sizes.tokens_per_step)],
            )  # fmt: skip
            result = _train(trainer, sizes, plan.checkpoint, reporter)
        state = trainer.full_state()
        if trainer.is_world_process_zero():
            model, tuner = trainer.accelerator.unwrap_model(trainer.model), learner.tuner
            detach(model)
            if tuner is not None and start.lora.merge:
                model, tuner = tuner.merge_and_unload(), None
            trained = Learner(model, tuner, learner.dtype)
            write_model(plan, trained, sizes, result, state=state, reporter=reporter)
            if left := remove(part):
                reporter.say(left)
    trainer.accelerator.wait_for_everyone()
    return result


@contextmanager
def _kept_on_failure(part: Path, reporter: Reporter) -> Iterator[None]:
    """What can be resumed stays when the block fails, and is named, unless that is what failed."""
    try:
        yield
    except BaseException as error:
        if checkpoints_in(part):
            note_resumable()
        kept = leave(part) if is_first() else None
        if kept is not None and not isinstance(error, CannotResume):
            reporter.say(f"stopped; {kept}")
        raise


def _train(
    trainer: SparsekTrainer, sizes: Sizes, checkpoint: Path | None, reporter: Reporter
) -> Trained:
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
            hint="set checkpointing=true, or lower micro_batch_size or sequence_length",
        ) from error
    except NoThreshold as error:
        step = trainer.state.global_step
        raise SparsekError(
            f"after step {step} tokens have scores above a billion, or none that are numbers",
            hint="it diverged: lower learning_rate and scorer_learning_rate, or raise warmup"
            if step
            else "the model's own scorers or weights are damaged: look with `sparsek doctor MODEL`",
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
        reporter.say(f"{worse}: the scorers it started with are kept (keep_better)")
    tokens = (trainer.state.global_step - resumed_at) * sizes.tokens_per_step
    return Trained(
        out=sizes.out,
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


def _check_dense(config: Any, wanted: "Settings") -> None:
    """Raises UsageError where a dense model is asked for what only SparseK models have."""
    if is_converted(config):
        return
    if wanted.objective.distill or wanted.layer_losses:
        raise UsageError(
            "a dense model is its own teacher: nothing to distill",
            hint="set objective.distill=0, or train a converted model",
        )
    if wanted.budgets or wanted.start.scorers != "gates":
        key, value = ("budgets", "[]") if wanted.budgets else ("scorer_training", "gates")
        raise UsageError(
            f"a dense model has no scorers and no budget: {key} says nothing to it",
            hint=f"set {key}={value}, or train a converted model",
        )


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
