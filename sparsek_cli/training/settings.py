"""A training request in parts, each of them all that one place below has to know."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsek_cli.output.contents import ADAPTERS, MODEL, Contents
from sparsek_cli.training.losses.objectives import LayerLoss, Teacher
from sparsek_cli.training.run_sizes import Batch

if TYPE_CHECKING:
    from sparsek_cli.recipes.schema_finetune import (
        Architecture,
        FinetuneRecipe,
        Launch,
        Lora,
        Objective,
    )
    from sparsek_cli.recipes.schema_sources import Evaluation, Source


@dataclass(frozen=True)
class Start:
    """What is trained: where weights come from, and which of them learn.

    Attributes:
        architecture: with random weights, the shape; None: pretrained ones.
        attention: SparseK settings, a model's `sparsek` block; None: as the model has them.
        train: scorers, lora or all. shapes_base: whether scores' gradient goes on below.
        scorers: how they learn: gates, concurrent, refit or frozen.
        length: tokens per sequence, a random model's positions.
        save_dtype: of the weights on disk; auto: as the base has them.
        contents: what will lie in OUT.
    """

    architecture: "Architecture | None"
    attention: dict[str, Any] | None
    train: str
    lora: "Lora"
    shapes_base: bool
    scorers: str
    length: int
    save_dtype: str
    contents: Contents
    seed: int


@dataclass(frozen=True)
class Rates:
    """How fast what learns; see the recipe's keys of the same names."""

    learning_rate: float
    scorer_learning_rate: float
    schedule: str
    min_learning_rate: float
    warmup: float
    weight_decay: float
    max_grad_norm: float

    def warmup_steps(self, steps: int) -> int:
        """Steps of a run of `steps` that the rate rises for; the first of them has rate 0."""
        return round(self.warmup if self.warmup >= 1 else self.warmup * steps)


@dataclass(frozen=True)
class Duration:
    """How long a run is: one of steps, tokens and epochs; and its most minutes."""

    steps: int | None
    tokens: int | None
    epochs: float | None
    minutes: float | None


@dataclass(frozen=True)
class Rhythm:
    """What happens every so many steps; 0: never. And where the log goes."""

    evaluate: int
    save: int
    log: int
    report_to: tuple[str, ...]


@dataclass(frozen=True)
class Execution:
    """How a step is computed; nothing of it changes what is learned."""

    checkpointing: bool
    compile: bool
    launch: "Launch"
    data_workers: int


@dataclass(frozen=True)
class Settings:
    """All parts of a request.

    Attributes:
        objective: what is minimised. sources: what is trained on, by name.
        layer_losses: makers of further losses from the model and its teacher; no recipe has a key
            for them, experiments set them.
        held_out: what the held-out loss is measured on.
        budgets: what steps keep: 1/n of the sequence, n drawn from these (1: dense attention);
            empty: the model's own.
        joined: whether documents of a sequence see each other.
        keep_better: whether scorers that training made worse are put back.
        overwrite: the folder to write may be there.
    """

    start: Start
    batch: Batch
    rates: Rates
    duration: Duration
    rhythm: Rhythm
    execution: Execution
    objective: "Objective"
    sources: "Mapping[str, Source]"
    held_out: "Evaluation"
    budgets: tuple[int, ...]
    joined: bool
    keep_better: bool
    overwrite: bool
    layer_losses: tuple[Callable[[Any, Teacher], LayerLoss], ...] = ()


def settings_of(recipe: "FinetuneRecipe") -> Settings:
    """A recipe in parts."""
    return Settings(
        start=start_of(recipe),
        batch=batch_of(recipe),
        rates=rates_of(recipe),
        duration=Duration(recipe.steps, recipe.tokens, recipe.epochs, recipe.minutes),
        rhythm=rhythm_of(recipe),
        execution=execution_of(recipe),
        objective=recipe.objective,
        sources=recipe.data,
        held_out=recipe.evaluation,
        budgets=tuple(recipe.budgets),
        joined=recipe.documents == "joined",
        keep_better=recipe.keep_better,
        overwrite=recipe.overwrite,
    )


def start_of(recipe: "FinetuneRecipe") -> Start:
    """The part of a recipe that says what is trained."""
    return Start(
        architecture=recipe.architecture if recipe.init == "random" else None,
        attention=recipe.attention,
        train=recipe.train,
        lora=recipe.lora,
        shapes_base=recipe.shapes_base,
        scorers=recipe.scorer_training,
        length=recipe.sequence_length,
        save_dtype=recipe.save_dtype,
        contents=MODEL if recipe.train != "lora" or recipe.lora.merge else ADAPTERS,
        seed=recipe.seed,
    )


def batch_of(recipe: "FinetuneRecipe") -> Batch:
    """The size of a step."""
    return Batch(recipe.sequence_length, recipe.batch_size, recipe.micro_batch_size)


def rates_of(recipe: "FinetuneRecipe") -> Rates:
    """The part of a recipe that the optimiser reads."""
    return Rates(
        learning_rate=recipe.learning_rate,
        scorer_learning_rate=recipe.scorer_learning_rate or recipe.learning_rate,
        schedule=recipe.schedule,
        min_learning_rate=recipe.min_learning_rate,
        warmup=recipe.warmup,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
    )


def rhythm_of(recipe: "FinetuneRecipe") -> Rhythm:
    """The part of a recipe that says what happens between steps."""
    return Rhythm(
        evaluate=recipe.evaluation.every,
        save=recipe.save_steps,
        log=recipe.log_steps,
        report_to=tuple(recipe.report_to),
    )


def execution_of(recipe: "FinetuneRecipe") -> Execution:
    """The part of a recipe that says how a step is computed."""
    return Execution(
        checkpointing=recipe.checkpointing,
        compile=recipe.compile,
        launch=recipe.launch,
        data_workers=recipe.data_workers,
    )
