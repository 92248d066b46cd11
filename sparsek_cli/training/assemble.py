"""A model and a trainer that are ready to start, from a run's settings."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from sparsek_cli import hub
from sparsek_cli.checkpoint_files.shards import read_shards, stored_dtype
from sparsek_cli.loading import check_tokenizer, embedding_rows
from sparsek_cli.quantised.gradients import check_gradients
from sparsek_cli.training.arguments import training_arguments
from sparsek_cli.training.budgets import DrawnBudgets
from sparsek_cli.training.datasets import Datasets
from sparsek_cli.training.losses.future_attention import FutureAttention
from sparsek_cli.training.losses.objectives import Objective, Teacher, attach, decoder_of
from sparsek_cli.training.losses.teacher import FrozenTeacher, OwnTeacher
from sparsek_cli.training.model import build_random, load_pretrained, random_config
from sparsek_cli.training.parameters import choose_parameters, trained_state
from sparsek_cli.training.progress import TimeLimit
from sparsek_cli.training.refit_scorers import Refit
from sparsek_cli.training.run_sizes import Sizes, logits_chunk
from sparsek_cli.training.settings import Execution, Settings, Start
from sparsek_cli.training.sharding import sharding_arguments
from sparsek_cli.training.trainer import SparsekTrainer


@dataclass(frozen=True)
class Learner:
    """A model whose learning parameters are chosen.

    Attributes:
        tuner: PEFT's LoraModel around the model; None: no adapters.
        dtype: of its weights on disk.
    """

    model: Any
    tuner: Any | None
    dtype: torch.dtype


def load(
    start: Start,
    tokenizer: Any,
    source: hub.Checkpoint | None,
    bf16: bool,
    device: torch.device,
) -> Learner:
    """The model that a run starts from."""
    shape = start.architecture
    if shape is not None:
        config = random_config(shape, start.attention, start.length, tokenizer)
        model = build_random(config, seed=start.seed)
        stored = torch.bfloat16 if bf16 else torch.float32
    else:
        stored = getattr(torch, stored_dtype(read_shards(source.path)))
        # What is frozen stays as it is stored; what learns all over needs float32 masters.
        loaded = torch.float32 if start.train == "all" or not bf16 else torch.bfloat16
        model = load_pretrained(source, start.attention or {}, loaded, device)
        check_gradients(model)
        check_tokenizer(tokenizer, embedding_rows(model), source.name)
    if start.save_dtype != "auto":
        stored = getattr(torch, start.save_dtype)
    torch.manual_seed(start.seed)  # adapters are drawn here
    tuner = choose_parameters(
        model, start.train, start.lora, shape_base=start.shapes_base, scorers=start.scorers
    )
    return Learner(model, tuner, stored)


def make_trainer(
    learner: Learner,
    settings: Settings,
    sizes: Sizes,
    data: Datasets,
    *,
    device: torch.device,
    part: Path,
    resumed: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> SparsekTrainer:
    """Everything that trains, ready to start.

    Args:
        part: where checkpoints go. resumed: whether there is one that the run goes on from.
        callbacks: called before those of the run itself.
    """
    model, start, rates = learner.model, settings.start, settings.rates
    losses = Objective(
        **settings.objective.model_dump(), loss_chunk=logits_chunk(model.config.vocab_size)
    )
    args = training_arguments(
        part, sizes, rates, settings.rhythm,
        seed=start.seed, cpu=device.type == "cpu", evaluates=data.held_out is not None,
        data_workers=settings.execution.data_workers,
        sharding=sharding_arguments(
            settings.execution.launch, model,
            bf16=sizes.dtype == "bfloat16", max_grad_norm=rates.max_grad_norm,
        ),
    )  # fmt: skip
    # To compare the end with; a resumed run has measured it, random weights say nothing.
    args.eval_on_start = data.held_out is not None and start.architecture is None and not resumed
    keeps_start = data.held_out is not None and start.train == "scorers" and settings.keep_better
    before = trained_state(model) if keeps_start else None
    _execute(model, settings.execution)
    future = FutureAttention() if start.scorers == "concurrent" else None
    return SparsekTrainer(
        rates=(rates.learning_rate, rates.scorer_learning_rate, rates.weight_decay),
        batch_size=sizes.batch.sequences,
        objective=losses,
        future=future,
        start=before,
        questions=data.questions,
        model=model,
        args=args,
        train_dataset=data.train,
        eval_dataset=data.held_out,
        callbacks=[
            *callbacks,
            *_attach_losses(learner, settings, sizes, losses, future),
            *_own_callbacks(model, settings, sizes, data),
        ],
    )


def _execute(model: Any, how: Execution) -> None:
    """Sets up checkpointing and compiling."""
    if how.checkpointing:
        # The first name is newer than the oldest transformers supported here.
        newer = getattr(model, "activation_checkpointing_enable", None)
        (newer or model.gradient_checkpointing_enable)({"use_reentrant": False})
    if how.compile:
        decoder_of(model).compile()


def _attach_losses(
    learner: Learner,
    settings: Settings,
    sizes: Sizes,
    objective: Objective,
    future: FutureAttention | None,
) -> list[TrainerCallback]:
    """Gives the model its losses; returns those of them that follow the run."""
    teacher = None
    if objective.distill or settings.layer_losses:
        bf16 = sizes.dtype == "bfloat16"
        teacher = _teacher(learner, frozen=settings.start.train == "all", bf16=bf16)
    further = [make(learner.model, teacher) for make in settings.layer_losses]
    attach(learner.model, objective, teacher, [*further, *([future] if future else [])])
    return [loss for loss in further if isinstance(loss, TrainerCallback)]


def _own_callbacks(
    model: Any, settings: Settings, sizes: Sizes, data: Datasets
) -> list[TrainerCallback]:
    """What happens between steps, beside what the caller wants to see."""
    found: list[TrainerCallback] = []
    if settings.budgets:
        length, seed = sizes.batch.length, settings.start.seed
        found.append(DrawnBudgets(model, settings.budgets, length, seed))
    if settings.start.scorers == "refit":
        found.append(Refit(model, data.train, sizes.batch.sequences, sizes.batch.micro))
    if settings.duration.minutes is not None:
        found.append(TimeLimit(60 * settings.duration.minutes))
    return found


def _teacher(learner: Learner, *, frozen: bool, bf16: bool) -> Teacher:
    """The model whose predictions are distilled. Made before `forward` is replaced.

    Args:
        frozen: the teacher is a copy; else the model itself, its adapters off.
    """
    if frozen:
        return FrozenTeacher(learner.model, torch.bfloat16 if bf16 else torch.float32)
    return OwnTeacher(learner.model, learner.tuner)
