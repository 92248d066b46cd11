"""A model and a trainer that are ready to start, from a run's settings."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparsek_cli import hub
from sparsek_cli.checkpoint_files.shards import read_shards, stored_dtype
from sparsek_cli.data.corpus import Corpus
from sparsek_cli.data.filler import Filler
from sparsek_cli.data.mixture import HeldOut, Mixture
from sparsek_cli.data.phrasings import phrasings
from sparsek_cli.data.questions import Question, make_questions
from sparsek_cli.errors import UsageError
from sparsek_cli.loading import check_tokenizer, embedding_rows
from sparsek_cli.quantised.gradients import check_gradients
from sparsek_cli.reporter import Bar, Reporter
from sparsek_cli.training.arguments import training_arguments
from sparsek_cli.training.budgets import DrawnBudgets
from sparsek_cli.training.losses.future_attention import FutureAttention
from sparsek_cli.training.losses.objectives import (
    Objective,
    Teacher,
    attach,
    decoder_of,
)
from sparsek_cli.training.losses.outputs import OutputErrors
from sparsek_cli.training.losses.teacher import FrozenTeacher, OwnTeacher
from sparsek_cli.training.model import build_random, load_pretrained, random_config
from sparsek_cli.training.parameters import choose_parameters, trained_state
from sparsek_cli.training.progress import ProgressReport, TimeLimit
from sparsek_cli.training.refit_scorers import Refit
from sparsek_cli.training.run_sizes import Sizes, logits_chunk
from sparsek_cli.training.settings import Execution, Rates, Rhythm, Start
from sparsek_cli.training.sharding import sharding_arguments
from sparsek_cli.training.trainer import SparsekTrainer

if TYPE_CHECKING:
    from sparsek_cli.recipes.schema_finetune import Objective as ObjectiveSettings
    from sparsek_cli.recipes.schema_sources import Evaluation

# Facts per document of the questions that measure held-out recall.
_FACTS = 4


def load(
    start: Start,
    tokenizer: Any,
    source: hub.Checkpoint | None,
    bf16: bool,
    device: torch.device,
) -> tuple[Any, Any, torch.dtype]:
    """Model with its learning parameters chosen, LoRA's tuner if any, and the dtype to save in."""
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
    return model, tuner, stored


def make_trainer(
    model: Any,
    tuner: Any | None,
    sizes: Sizes,
    device: torch.device,
    part: Path,
    *,
    objective: "ObjectiveSettings",
    outputs: float = 0.0,
    rates: Rates,
    rhythm: Rhythm,
    execution: Execution,
    seed: int,
    scorers: str = "gates",
    budgets: Sequence[int] = (),
    minutes: float | None = None,
    data: Mixture,
    held_out: HeldOut | None,
    questions: Sequence[Question] = (),
    measures_start: bool = False,
    keeps_better: bool = False,
    reporter: Reporter,
    bar: Bar,
) -> SparsekTrainer:
    """Everything that trains, ready to start.

    Args:
        model: its learning parameters are chosen. tuner: PEFT's LoraModel, or None.
        sizes: of the run. part: where checkpoints go.
        outputs: weight of the error of attention's outputs, see losses/outputs.py.
        scorers: how they learn, the recipe's `scorer_training`. budgets: see budgets.py.
        data: what is trained on. held_out: sequences for the held-out loss, or None.
        questions: for recall, see `held_out_questions`.
        measures_start: whether the held-out loss is measured before the first step, too.
        keeps_better: whether the parameters of the start are kept to go back to.
    """
    losses = Objective(
        **objective.model_dump(),
        loss_chunk=logits_chunk(model.config.vocab_size),
    )
    bf16 = sizes.dtype == "bfloat16"
    args = training_arguments(
        part, sizes, rates, rhythm, seed=seed, cpu=device.type == "cpu",
        evaluates=held_out is not None, data_workers=execution.data_workers,
        sharding=sharding_arguments(
            execution.launch, model, bf16=bf16, max_grad_norm=rates.max_grad_norm
        ),
    )  # fmt: skip
    start = trained_state(model) if keeps_better and held_out is not None else None
    args.eval_on_start = held_out is not None and measures_start
    if execution.checkpointing:
        # The first name is newer than the oldest transformers supported here.
        newer = getattr(model, "activation_checkpointing_enable", None)
        (newer or model.gradient_checkpointing_enable)({"use_reentrant": False})
    if execution.compile:
        decoder_of(model).compile()
    future = FutureAttention() if scorers == "concurrent" else None
    teacher = None
    if objective.distill or outputs:
        teacher = _teacher(model, tuner, frozen=sizes.train == "all", bf16=bf16)
    errors = OutputErrors(model, teacher, outputs) if outputs else None
    attach(model, losses, teacher, future, errors)
    callbacks = [ProgressReport(reporter, bar, sizes.tokens_per_step)]
    if errors is not None:
        callbacks.append(errors)
    if budgets:
        callbacks.append(DrawnBudgets(model, tuple(budgets), sizes.batch.length, seed))
    if scorers == "refit":
        callbacks.append(Refit(model, data, sizes.batch.sequences, sizes.batch.micro))
    if minutes is not None:
        callbacks.append(TimeLimit(60 * minutes))
    return SparsekTrainer(
        rates=(rates.learning_rate, rates.scorer_learning_rate, rates.weight_decay),
        batch_size=sizes.batch.sequences,
        objective=losses,
        future=future,
        start=start,
        questions=questions,
        model=model,
        args=args,
        train_dataset=data,
        eval_dataset=held_out,
        callbacks=callbacks,
    )


def held_out_questions(
    wanted: "Evaluation", held_out: Corpus | None, tokenizer: Any, *, length: int, seed: int
) -> list[Question]:
    """The questions that `evaluation.questions` asks for.

    Raises:
        UsageError: the tokenizer has no chat template, or sequences are too short for a document.
    """
    if not wanted.questions or held_out is None:
        return []
    try:
        return make_questions(
            [seed], Filler.from_corpus(held_out, tokenizer),
            length=length, needles=_FACTS, count=wanted.questions,
            phrasings=phrasings("calibration"),
        )  # fmt: skip
    except ValueError as error:
        raise UsageError(
            f"evaluation.questions: {error}", hint="set it to 0, or sequence_length higher"
        ) from error


def _teacher(model: Any, tuner: Any | None, *, frozen: bool, bf16: bool) -> Teacher:
    """The model whose predictions are distilled. Made before `forward` is replaced.

    Args:
        frozen: the teacher is a copy; else the model itself, its adapters off.
    """
    if frozen:
        return FrozenTeacher(model, torch.bfloat16 if bf16 else torch.float32)
    return OwnTeacher(model, tuner)
