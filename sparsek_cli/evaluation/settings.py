"""An evaluation's request in parts, each of them all that one place below has to know."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from sparsek_cli.recipes.schema_evaluate import EvaluateRecipe


@dataclass(frozen=True)
class Loading:
    """How the checkpoint becomes a model; device and dtype as users name them."""

    device: str
    dtype: str
    yarn: float | None


@dataclass(frozen=True)
class Rivals:
    """What the model is compared with: policies by name, budgets in pairs per KV head."""

    baselines: tuple[str, ...]
    budgets: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class Samples:
    """Which samples tasks draw, and from what.

    Attributes:
        lengths: in tokens, of prompts that can be made at any length; empty: each task's own.
        limit, limits: samples per task and length, and of single tasks; None: all.
        data, text: local data instead of the hub's; text for ppl and as filler.
    """

    lengths: tuple[int, ...]
    limit: int | None
    limits: dict[str, int]
    data: str | None
    text: tuple[str, ...]
    chat_template: Literal["auto", "on", "off"]
    seed: int

    def limit_of(self, task: str) -> int | None:
        """Samples of one task; None for all of them."""
        return self.limits.get(task, self.limit)


@dataclass(frozen=True)
class Prompts:
    """How prompts are read and answers written.

    Attributes:
        max_length: most tokens of both together; None: the model's own.
        truncate: prompts beyond it are refused, or cut at the left or in the middle.
        batch_size: side by side; None: as many as fit.
        max_new_tokens: upper bound on answers, below each task's own.
        share_prefix: a document is read once for all questions about it; tests compare with
            reading it for each of them, as lm-eval does.
    """

    max_length: int | None
    truncate: Literal["refuse", "left", "middle"]
    batch_size: int | None
    max_new_tokens: int | None
    share_prefix: bool = True


def loading_of(recipe: "EvaluateRecipe") -> Loading:
    """The part of a recipe that loading reads."""
    return Loading(recipe.device, recipe.dtype, recipe.yarn)


def rivals_of(recipe: "EvaluateRecipe") -> Rivals:
    """The part of a recipe that policies are made from."""
    return Rivals(tuple(recipe.baselines), tuple(recipe.budgets), recipe.seed)


def samples_of(recipe: "EvaluateRecipe") -> Samples:
    """The part of a recipe that tasks read."""
    return Samples(
        lengths=tuple(recipe.lengths),
        limit=recipe.limit,
        limits=dict(recipe.limits),
        data=recipe.data,
        text=tuple(recipe.text),
        chat_template=recipe.chat_template,
        seed=recipe.seed,
    )


def prompts_of(recipe: "EvaluateRecipe") -> Prompts:
    """The part of a recipe that lm-eval's model class reads."""
    return Prompts(
        max_length=recipe.max_length,
        truncate=recipe.truncate,
        batch_size=None if recipe.batch_size == "auto" else recipe.batch_size,
        max_new_tokens=recipe.max_new_tokens,
    )
