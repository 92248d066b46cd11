"""The recipe of `sparsek finetune`: every key, its type, default and meaning."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Field,
    StrictInt,
    model_validator,
)

from sparsek_cli.recipes.earlier_versions import SETTLED_FINETUNE, without_settled
from sparsek_cli.recipes.limits import (
    LONGEST,
    MOST_OF_A_STEP,
    MOST_SEQUENCES,
    MOST_SLOTS,
    MOST_WORKERS,
)
from sparsek_cli.recipes.scalars import (
    Count,
    Length,
    NotNegative,
    Positive,
    Seed,
    Share,
    Switch,
    Whole,
)
from sparsek_cli.recipes.schema_sources import Evaluation, Source, Strict

# What to do where a run is asked for them, as convert may be.
_STAND_INS = (
    "`sparsek convert` fits them, with --again to a model that was trained from random weights; a "
    "model that has them trains them"
)
Kept = Annotated[StrictInt, Field(ge=0, le=MOST_SLOTS)]


def _full_name(value: object) -> object:
    names = {"bf16": "bfloat16", "fp32": "float32"}
    return names.get(value, value) if isinstance(value, str) else value


Trained = Annotated[Literal["auto", "bfloat16", "float32"], BeforeValidator(_full_name)]


class Architecture(Strict):
    """Shape of a model trained from scratch."""

    type: str = Field("llama", description="dense family: llama, mistral, qwen2, qwen3, ...")
    settings: dict[str, Any] = Field(
        default_factory=dict,
        description="fields of the family's own config: hidden_size, n_embd, ...",
    )


class SparseK(Strict):
    """Attention settings; for a converted model the ones given here replace its own."""

    topk: Kept | list[Kept] | list[Kept | list[Kept]] | None = Field(
        None, description="selected keys per KV head: one number, one per layer, or one per head"
    )
    window: Length | None = Field(None, description="newest tokens always seen, itself included")
    sinks: Annotated[StrictInt, Field(ge=0, le=LONGEST)] | None = Field(
        None, description="first tokens always seen"
    )
    gate: Literal["straight_through", "log", "kv"] | None = Field(
        None, description="how scores enter attention: straight_through, log or kv (the paper's)"
    )
    scorer: Literal["linear", "mlp", "random"] | None = Field(
        None,
        description="with init: random: linear and mlp are learned; random keeps random pairs, a "
        "rival",
    )

    def settings(self) -> dict[str, Any]:
        """The keys that are given, as a model's `sparsek` block has them."""
        given = self.model_dump(exclude_none=True)
        return {**given, "scorer": {"type": self.scorer}} if self.scorer else given


class Lora(Strict):
    """Low-rank adapters; used with `train: lora`."""

    rank: Length = Field(16, description="rank of the adapters")
    alpha: Positive = Field(32.0, description="adapter scale; the update is alpha / rank x B A")
    dropout: Share = Field(0.0, lt=1, description="dropout on the adapters' input")
    targets: list[str] = Field(
        default_factory=list,
        description="names of the linear layers to adapt; empty: all linear layers of the blocks",
    )
    scorers: Switch = Field(True, description="train the scorers together with the adapters")
    merge: Switch = Field(
        True,
        description="merge the adapters into the weights at the end; false: OUT holds the adapters "
        "(and trained scorers) alone, for PEFT",
    )


class Objective(Strict):
    """What is minimised: the weighted sum of these losses."""

    lm: NotNegative = Field(1.0, description="weight of the language-model loss")
    distill: NotNegative = Field(
        0.0,
        description="weight of the KL divergence to the weights a run starts from, with dense "
        "attention",
    )
    answer_weight: NotNegative = Field(
        1.0, description="the loss is mean text loss + answer_weight x mean answer loss"
    )


class Launch(Strict):
    """How the processes that torchrun or accelerate started share one model."""

    strategy: Literal["ddp", "fsdp", "zero2", "zero3"] = Field(
        "ddp",
        description="ddp: every process holds everything; fsdp: parameters, gradients and AdamW "
        "state are sharded (FSDP2); zero2, zero3: the same by DeepSpeed",
    )
    offload: Switch = Field(False, description="keep what is sharded in CPU memory")


class FinetuneRecipe(Strict):
    """Everything `sparsek finetune` does, in one mapping."""

    settled: ClassVar[dict[str, str]] = {
        **{key: hint for key, (_, hint) in SETTLED_FINETUNE.items()},
        **dict.fromkeys(("stand_ins", "sparsek.stand_ins"), _STAND_INS),
    }

    model: str | None = Field(None, description="folder, short name or hub id to start from")
    out: str | None = Field(None, description="folder to write; default <name>-finetuned")
    overwrite: Switch = Field(
        False, description="replace `out` if it exists, and forget an unfinished run"
    )
    init: Literal["pretrained", "random"] = Field(
        "pretrained", description="start from the model's weights, or from random ones"
    )
    architecture: Architecture | None = Field(
        None, description="shape of the model when init is random"
    )
    tokenizer: str | None = Field(
        None,
        description="folder or model whose tokenizer is used, or the name of a stream; default: "
        "the model's own",
    )
    sparsek: SparseK | None = Field(
        None, description="attention settings; null trains the model as it is (dense when dense)"
    )
    train: Literal["scorers", "lora", "all"] = Field(
        "scorers", description="scorers (frozen base), lora (adapters and scorers), or all"
    )
    scorer_training: Literal["gates", "concurrent", "refit", "frozen"] = Field(
        "gates",
        description="how scorers learn: through the gates, by the gradient of the objective; "
        "concurrent: at each step from the attention that later queries of the same pass give each "
        "key, at the border of what is kept; refit: fitted anew in closed form every 50 steps; or "
        "frozen. But for gates, attention sees scores as constants",
    )
    budgets: list[Count] = Field(
        default_factory=list,
        description="each step keeps 1/n of sequence_length, n drawn from these, shared out among "
        "heads as the model's own budget is (1: dense attention); []: always the model's own",
    )
    lora: Lora = Field(default_factory=Lora, description="adapter settings for train: lora")
    objective: Objective = Field(default_factory=Objective, description="what is minimised")
    data: dict[str, Source] = Field(
        default_factory=dict, description="sources by name; each sequence comes from one of them"
    )
    sequence_length: Annotated[StrictInt, Field(ge=8, le=LONGEST)] = Field(
        4096, description="tokens per sequence"
    )
    documents: Literal["separate", "joined"] = Field(
        "separate",
        description="separate: a document never sees its neighbours in the sequence; joined: it "
        "does (dense models train several times faster, they need no mask)",
    )
    batch_size: Annotated[StrictInt, Field(ge=1, le=MOST_OF_A_STEP)] = Field(
        8, description="sequences per optimiser step, over all processes"
    )
    micro_batch_size: Annotated[StrictInt, Field(ge=1, le=MOST_SEQUENCES)] = Field(
        1, description="sequences per forward pass and process; the rest is accumulated"
    )
    steps: Count | None = Field(None, description="optimiser steps (or give tokens/epochs)")
    tokens: Count | None = Field(None, description="training tokens, rounded up to a step")
    epochs: Positive | None = Field(None, description="passes over the text sources")
    minutes: Positive | None = Field(
        None, description="end the run after so many minutes, before its last step if need be"
    )
    learning_rate: Positive = Field(1e-4, description="peak rate of the base or adapters")
    scorer_learning_rate: Positive | None = Field(
        None, description="peak rate of scorers and slopes; default: learning_rate"
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="how the rate falls after the warm-up"
    )
    min_learning_rate: Share = Field(0.0, description="end of the cosine, as a share of the peak")
    warmup: NotNegative = Field(
        0.03, description="warm-up: a share of the steps if below 1, else steps"
    )
    weight_decay: NotNegative = Field(0.0, description="AdamW decay of weight matrices")
    max_grad_norm: NotNegative = Field(1.0, description="clip the gradient; 0: never")
    checkpointing: Switch = Field(
        False, description="recompute activations in the backward pass to save memory"
    )
    dtype: Trained = Field(
        "auto",
        description="bfloat16 (autocast) or float32; auto: bfloat16 where the GPU has it",
    )
    save_dtype: Trained = Field(
        "auto", description="weights on disk; auto: as the base has them, else as trained"
    )
    compile: Switch = Field(False, description="torch.compile the model")
    keep_better: Switch = Field(
        True,
        description="with train: scorers, keep the start if held-out loss or recall got worse",
    )
    launch: Launch = Field(
        default_factory=Launch, description="how several processes share one model"
    )
    evaluation: Evaluation = Field(
        default_factory=Evaluation, description="held-out loss during and after training"
    )
    save_steps: Whole = Field(0, description="checkpoint every so many steps; 0: never")
    log_steps: Count = Field(10, description="log every so many steps")
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        default_factory=list, description="where the log also goes"
    )
    data_workers: Annotated[StrictInt, Field(ge=0, le=MOST_WORKERS)] = Field(
        0,
        description="processes that prepare sequences; 0: in the training process",
    )
    seed: Seed = Field(0, description="seed of data, initialisation and dropout")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")

    @property
    def shapes_base(self) -> bool:
        """Whether the gradient of scores goes on into the layers below: only from random weights.

        It costs a converted model text and facts (docs/results).
        """
        return self.init == "random"

    @model_validator(mode="before")
    @classmethod
    def _forget(cls, given: Any) -> Any:
        """Keys of earlier versions go where they say what is now always done."""
        return without_settled(given, SETTLED_FINETUNE)

    @property
    def attention(self) -> dict[str, Any] | None:
        """The attention settings that are given; None: none."""
        return None if self.sparsek is None else self.sparsek.settings()

    @model_validator(mode="after")
    def _consistent(self) -> "FinetuneRecipe":
        lengths = [self.steps, self.tokens, self.epochs]
        if sum(length is not None for length in lengths) > 1:
            raise ValueError(
                "takes one of 'steps', 'tokens', 'epochs', not several "
                "(steps=null drops a recipe's)"
            )
        if self.init == "pretrained" and self.sparsek is not None and self.sparsek.scorer:
            raise ValueError("can set sparsek.scorer with init: random only")
        if self.init == "random" and self.architecture is None:
            raise ValueError("with init: random needs an 'architecture'")
        if self.init == "random" and self.train != "all":
            raise ValueError("with init: random needs train: all (nothing is worth freezing)")
        self._check_scorer_training()
        if (
            self.evaluation.questions
            and self.evaluation.held_out == 0
            and not (self.evaluation.files or self.evaluation.dataset)
        ):
            raise ValueError("needs held-out text for evaluation.questions")
        for name, source in self.data.items():
            filler = getattr(source, "filler", None)
            if filler is not None and getattr(self.data.get(filler), "kind", None) != "text":
                raise ValueError(f"data.{name}.filler must name a text source, not '{filler}'")
        return self

    def _check_scorer_training(self) -> None:
        how, own = self.scorer_training, self.scorer_training == "concurrent"
        if not (self.objective.lm or self.objective.distill or own):
            raise ValueError("has nothing to minimise: objective.lm and objective.distill are 0")
        if (
            self.train == "scorers" and how == "frozen"
        ):  # by refit stand-ins may learn: model by model
            raise ValueError(f"with train: scorers and scorer_training: {how} has nothing to train")
        if self.train == "lora" and not self.lora.scorers and how in ("refit", "concurrent"):
            raise ValueError(f"with scorer_training: {how} needs lora.scorers: true")
        if own and self.compile:
            raise ValueError("with scorer_training: concurrent needs compile: false")
