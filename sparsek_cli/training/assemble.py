"""From a recipe to a model and a trainer that are ready to start."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparsek_cli import hub
from sparsek_cli.data.corpus import Corpus
from sparsek_cli.data.filler import Filler
from sparsek_cli.data.mixture import HeldOut, Mixture
from sparsek_cli.data.phrasings import phrasings
from sparsek_cli.data.questions import Question, make_questions
from sparsek_cli.errors import UsageError
from sparsek_cli.models import DENSE_ATTENTION
from sparsek_cli.training.arguments import training_arguments
from sparsek_cli.training.future import ATTENTION as OBSERVED
from sparsek_cli.training.future import FutureAttention
from sparsek_cli.training.model import build_random, load_pretrained
from sparsek_cli.training.objectives import Objective, Teacher, attach, decoder_of
from sparsek_cli.training.parameters import choose_parameters, trained_state
from sparsek_cli.training.plan import TrainingPlan
from sparsek_cli.training.progress import ProgressReport, Report, TimeLimit
from sparsek_cli.training.sharding import sharding_arguments
from sparsek_cli.training.stages import BudgetStages
from sparsek_cli.training.teacher import FrozenTeacher, OwnTeacher
from sparsek_cli.training.trainer import SparsekTrainer

if TYPE_CHECKING:
    from sparsek_cli.recipes.schema_finetune import FinetuneRecipe


def load(
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


def make_trainer(
    recipe: "FinetuneRecipe",
    model: Any,
    tuner: Any | None,
    plan: TrainingPlan,
    device: torch.device,
    part: Path,
    *,
    data: Mixture,
    held_out: HeldOut | None,
    questions: Sequence[Question] = (),
    resumed: bool,
    report: Report,
) -> SparsekTrainer:
    """Everything that trains, ready to start.

    Args:
        model: its learning parameters are chosen. tuner: PEFT's LoraModel, or None.
        plan: what make_plan said. part: where checkpoints go.
        data: what is trained on. held_out: sequences for the held-out loss, or None.
        questions: for recall, see `held_out_questions`.
        resumed: whether the run continues an earlier one.
    """
    objective = Objective(**recipe.objective.model_dump(), loss_chunk=recipe.loss_chunk)
    args = training_arguments(
        recipe, part, steps=plan.steps, bf16=plan.precision == "bf16", cpu=device.type == "cpu",
        processes=plan.processes, evaluates=held_out is not None,
        sharding=sharding_arguments(recipe, model, bf16=plan.precision == "bf16"),
    )  # fmt: skip
    compares = recipe.train == "scorers" and recipe.keep_better and held_out is not None
    start = trained_state(model) if compares else None
    # The start, to compare the end with; a resumed run has measured it, random weights say nothing.
    args.eval_on_start = held_out is not None and recipe.init != "random" and not resumed
    if recipe.checkpointing:
        # The first name is newer than the oldest transformers supported here.
        newer = getattr(model, "activation_checkpointing_enable", None)
        (newer or model.gradient_checkpointing_enable)({"use_reentrant": False})
    if recipe.compile:
        decoder_of(model).compile()
    attach(model, objective, *_teacher(recipe, model, tuner, plan))
    stages = BudgetStages(model, recipe.budget_stages) if recipe.budget_stages else None
    limits = [] if recipe.minutes is None else [TimeLimit(60 * recipe.minutes)]
    return SparsekTrainer(
        recipe=recipe,
        objective=objective,
        start=start,
        questions=questions,
        stages=stages,
        model=model,
        args=args,
        train_dataset=data,
        eval_dataset=held_out,
        callbacks=[ProgressReport(report, plan.tokens_per_step), *limits],
    )


def held_out_questions(
    recipe: "FinetuneRecipe", held_out: Corpus | None, tokenizer: Any
) -> list[Question]:
    """The questions that `evaluation.questions` asks for.

    Raises:
        UsageError: the tokenizer has no chat template, or sequences are too short for a document.
    """
    wanted = recipe.evaluation
    if not wanted.questions or held_out is None:
        return []
    try:
        return make_questions(
            [recipe.seed], Filler.from_corpus(held_out, tokenizer),
            length=recipe.sequence_length, needles=wanted.needles, count=wanted.questions,
            phrasings=phrasings("calibration"),
        )  # fmt: skip
    except ValueError as error:
        raise UsageError(
            f"evaluation.questions: {error}", hint="set it to 0, or sequence_length higher"
        ) from error


def _teacher(
    recipe: "FinetuneRecipe", model: Any, tuner: Any | None, plan: TrainingPlan
) -> tuple[Teacher | None, FutureAttention | None]:
    """Who is imitated, and who watches its attention; made before `forward` is replaced."""
    wanted = recipe.objective
    if wanted.distill == 0 and wanted.future == 0:
        return None, None
    attention = OBSERVED if wanted.future else DENSE_ATTENTION
    if recipe.train == "all":
        dtype = torch.bfloat16 if plan.precision == "bf16" else torch.float32
        teacher = FrozenTeacher(model, dtype, attention)
    else:
        teacher = OwnTeacher(model, tuner, attention)
    return teacher, FutureAttention(model) if wanted.future else None
