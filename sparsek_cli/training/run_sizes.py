"""What a run will do, worked out before anything is trained: `--dry-run` prints it."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsek_cli.devices import world_size
from sparsek_cli.errors import UsageError

if TYPE_CHECKING:
    from sparsek_cli.data.corpus import Corpus
    from sparsek_cli.hub import Checkpoint
    from sparsek_cli.training.settings import Settings

GIB = 2**30


@dataclass(frozen=True)
class Batch:
    """The size of an optimiser step.

    Attributes:
        length: tokens per sequence.
        sequences: per step, over all processes.
        micro: sequences per forward pass and process.
    """

    length: int
    sequences: int
    micro: int

    @property
    def tokens(self) -> int:
        """Tokens per step."""
        return self.length * self.sequences


@dataclass(frozen=True)
class Sizes:
    """The sizes of a run.

    Attributes:
        batch: the size of a step. trained, frozen: numbers of parameters.
        steps: optimiser steps. tokens: training tokens in all.
        tokens_per_step: over all processes.
        accumulation: forward passes per process and step.
        processes: how many share a step.
        text_tokens: tokens of each text source.
        dtype: bfloat16 (autocast) or float32.
        memory_gib: estimate for one process: weights, gradients, AdamW state, activations, logits.
    """

    model: str
    out: str
    train: str
    batch: Batch
    trained: int
    frozen: int
    steps: int
    tokens: int
    tokens_per_step: int
    accumulation: int
    processes: int
    text_tokens: dict[str, int]
    dtype: str
    memory_gib: float

    def data(self) -> dict[str, Any]:
        """For --json."""
        return {key: value for key, value in asdict(self).items() if key != "batch"}

    def text(self) -> str:
        """For a person."""
        sources = ", ".join(f"{name} {count:,}" for name, count in self.text_tokens.items())
        return "\n".join(
            [
                f"model        {self.model}",
                f"out          {self.out}",
                f"train        {self.train}: {self.trained:,} parameters learn, "
                f"{self.frozen:,} stay",
                f"steps        {self.steps:,} of {self.tokens_per_step:,} tokens "
                f"({self.tokens:,} in all)",
                f"processes    {self.processes}, {self.accumulation} forward passes each per step",
                f"text         {sources or 'none'} (tokens)",
                f"dtype        {self.dtype}",
                "many GPUs    torchrun --nproc-per-node N -m sparsek_cli finetune ...",
                f"memory       about {self.memory_gib:.1f} GiB per process (estimate)",
            ]
        )


def counted_steps(count: int) -> str:
    """Such as `1 step` and `1,500 steps`."""
    return f"{count:,} step{'' if count == 1 else 's'}"


def sizes_of(
    model: Any,
    settings: "Settings",
    texts: "dict[str, Corpus]",
    source: "Checkpoint | None",
    out: Path,
    bf16: bool,
) -> Sizes:
    """What the request comes to for this model and this text.

    Args:
        model: its parameters have been chosen; may be on the meta device.
        texts: by name. source: where weights come from; None: random ones.
    """
    batch, duration, execution = settings.batch, settings.duration, settings.execution
    counts = {name: corpus.total for name, corpus in texts.items()}
    weights = {name: block.weight for name, block in settings.sources.items()}
    steps = count_steps(
        batch, counts, weights, steps=duration.steps, tokens=duration.tokens, epochs=duration.epochs
    )
    memory = estimate_bytes(
        model,
        batch,
        bf16=bf16,
        checkpointing=execution.checkpointing,
    )
    name = source.name if source else f"{settings.start.architecture.type} (random)"
    return measure(
        model, batch, steps,
        name=name, out=out, train=settings.start.train, text_tokens=counts, bf16=bf16,
        memory=memory,
    )  # fmt: skip


def count_steps(
    batch: Batch,
    texts: Mapping[str, int],
    weights: Mapping[str, float],
    *,
    steps: int | None = None,
    tokens: int | None = None,
    epochs: float | None = None,
) -> int:
    """Optimiser steps from `steps`, `tokens` or `epochs` (default: one epoch of the text).

    Args:
        texts: tokens of each text source. weights: shares of all sources.

    Raises:
        UsageError: epochs of a recipe without text.
    """
    if steps is not None:
        return steps
    if tokens is not None:
        return math.ceil(tokens / batch.tokens)
    trained = {name: count for name, count in texts.items() if weights[name] > 0}
    if not trained:
        raise UsageError("no text source to count epochs of", hint="give 'steps' or 'tokens'")
    total = sum(weights.values())
    # So many tokens in all that the text source that lasts longest has been read once.
    needed = max(count * total / weights[name] for name, count in trained.items())
    return max(1, math.ceil((epochs or 1.0) * needed / batch.tokens))


def count_accumulation(batch: Batch, processes: int) -> int:
    """Forward passes per process and step.

    Raises:
        UsageError: the global batch cannot be shared out evenly.
    """
    together = batch.micro * processes
    if batch.sequences % together:
        raise UsageError(
            f"batch_size {batch.sequences} is no multiple of micro_batch_size x processes "
            f"({batch.micro} x {processes})",
            hint=f"set batch_size={math.ceil(batch.sequences / together) * together}",
        )
    return batch.sequences // together


def measure(
    model: Any,
    batch: Batch,
    steps: int,
    *,
    name: str,
    out: Path,
    train: str,
    text_tokens: dict[str, int],
    bf16: bool,
    memory: float,
) -> Sizes:
    """The sizes of a run of a model whose parameters have been chosen.

    Args:
        model: may be on the meta device. name: what to call it.
        train: what learns, in a word. text_tokens: of each text source.
        memory: bytes, see `estimate_bytes`.
    """
    processes = world_size()
    return Sizes(
        model=name,
        out=str(out),
        train=train,
        batch=batch,
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        frozen=sum(p.numel() for p in model.parameters() if not p.requires_grad),
        steps=steps,
        tokens=steps * batch.tokens,
        tokens_per_step=batch.tokens,
        accumulation=count_accumulation(batch, processes),
        processes=processes,
        text_tokens=text_tokens,
        dtype="bfloat16" if bf16 else "float32",
        memory_gib=memory / GIB,
    )


def logits_chunk(vocabulary: int) -> int:
    """Tokens whose logits exist at one time: about 67M numbers, whatever the vocabulary."""
    return max(1, 2**26 // vocabulary)


def estimate_bytes(model: Any, batch: Batch, *, bf16: bool, checkpointing: bool) -> float:
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
    tokens = batch.micro * batch.length
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    inner = max(inner) if isinstance(inner, list | tuple) else inner  # of each layer
    layer = tokens * unit * (16 * config.hidden_size + 4 * inner)
    if checkpointing:
        activations = config.num_hidden_layers * tokens * unit * config.hidden_size + layer
    else:
        activations = config.num_hidden_layers * layer
    logits = min(logits_chunk(config.vocab_size), tokens) * config.vocab_size * 12
    return weights + activations + logits
