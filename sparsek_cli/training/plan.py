"""What a run will do, worked out before anything is trained: `--dry-run` prints it."""

import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsek_cli.errors import UsageError

if TYPE_CHECKING:
    from sparsek_cli.data.corpus import Corpus
    from sparsek_cli.recipes.schema_finetune import FinetuneRecipe

GIB = 2**30


@dataclass(frozen=True)
class TrainingPlan:
    """The sizes of a run.

    Attributes:
        trained, frozen: numbers of parameters.
        steps: optimiser steps. tokens: training tokens in all.
        tokens_per_step: over all processes.
        accumulation: forward passes per process and step.
        processes: how many share a step.
        text_tokens: tokens of each text source.
        precision: bf16 or fp32.
        memory_gib: estimate for one process: weights, gradients, AdamW state, activations, logits.
    """

    model: str
    output: str
    train: str
    trained: int
    frozen: int
    steps: int
    tokens: int
    tokens_per_step: int
    accumulation: int
    processes: int
    text_tokens: dict[str, int]
    precision: str
    memory_gib: float

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)

    def text(self) -> str:
        """For a person."""
        sources = ", ".join(f"{name} {count:,}" for name, count in self.text_tokens.items())
        return "\n".join(
            [
                f"model        {self.model}",
                f"output       {self.output}",
                f"train        {self.train}: {self.trained:,} parameters learn, "
                f"{self.frozen:,} stay",
                f"steps        {self.steps:,} of {self.tokens_per_step:,} tokens "
                f"({self.tokens:,} in all)",
                f"processes    {self.processes}, {self.accumulation} forward passes each per step",
                f"text         {sources or 'none'} (tokens)",
                f"precision    {self.precision}",
                "many GPUs    torchrun --nproc-per-node N -m sparsek_cli finetune ...",
                f"memory       about {self.memory_gib:.1f} GiB per process (estimate)",
            ]
        )


def world_size() -> int:
    """Processes started by torchrun or accelerate launch; 1 without them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def count_steps(recipe: "FinetuneRecipe", texts: "dict[str, Corpus]") -> int:
    """Optimiser steps from `steps`, `tokens` or `epochs` (default: one epoch of the text).

    Raises:
        UsageError: epochs of a recipe without text.
    """
    per_step = recipe.batch_size * recipe.sequence_length
    if recipe.steps is not None:
        return recipe.steps
    if recipe.tokens is not None:
        return math.ceil(recipe.tokens / per_step)
    shares = {name: block.weight for name, block in recipe.data.items()}
    trained = {name: c for name, c in texts.items() if shares[name] > 0}
    if not trained:
        raise UsageError("no text source to count epochs of", hint="give 'steps' or 'tokens'")
    total = sum(shares.values())
    # So many tokens in all that the text source that lasts longest has been read once.
    needed = max(c.total * total / shares[name] for name, c in trained.items())
    return max(1, math.ceil((recipe.epochs or 1.0) * needed / per_step))


def count_accumulation(recipe: "FinetuneRecipe", processes: int) -> int:
    """Forward passes per process and step.

    Raises:
        UsageError: the global batch cannot be shared out evenly.
    """
    together = recipe.micro_batch_size * processes
    if recipe.batch_size % together:
        raise UsageError(
            f"batch_size {recipe.batch_size} is no multiple of micro_batch_size x processes "
            f"({recipe.micro_batch_size} x {processes})",
            hint=f"set batch_size={math.ceil(recipe.batch_size / together) * together}",
        )
    return recipe.batch_size // together


def make_plan(
    recipe: "FinetuneRecipe",
    model: Any,
    texts: "dict[str, Corpus]",
    *,
    name: str,
    output: Path,
    bf16: bool,
) -> TrainingPlan:
    """The plan for a model whose parameters have been chosen (it may be on the meta device)."""
    processes = world_size()
    steps = count_steps(recipe, texts)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    per_step = recipe.batch_size * recipe.sequence_length
    return TrainingPlan(
        model=name,
        output=str(output),
        train=recipe.train,
        trained=trained,
        frozen=frozen,
        steps=steps,
        tokens=steps * per_step,
        tokens_per_step=per_step,
        accumulation=count_accumulation(recipe, processes),
        processes=processes,
        text_tokens={name: corpus.total for name, corpus in texts.items()},
        precision="bf16" if bf16 else "fp32",
        memory_gib=estimate_bytes(recipe, model, bf16=bf16) / GIB,
    )


def estimate_bytes(recipe: "FinetuneRecipe", model: Any, *, bf16: bool) -> float:
    """Bytes one process needs, derived; within a factor of about 1.5 of what is measured.

    Learning parameters: float32 weight, gradient, two AdamW moments. Activations per token and
    layer: about 16 C + 4 F values (C width, F feed-forward), or C with checkpointing plus one
    layer in full. Logits: the chunk, its float32 copy and its gradient.
    """
    config = model.config
    unit = 2 if bf16 else 4
    weights = sum(
        16 * p.numel() if p.requires_grad else p.numel() * p.element_size()
        for p in model.parameters()
    )
    tokens = recipe.micro_batch_size * recipe.sequence_length
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    layer = tokens * unit * (16 * config.hidden_size + 4 * inner)
    if recipe.checkpointing:
        activations = config.num_hidden_layers * tokens * unit * config.hidden_size + layer
    else:
        activations = config.num_hidden_layers * layer
    logits = min(recipe.loss_chunk, tokens) * config.vocab_size * 12
    return weights + activations + logits
