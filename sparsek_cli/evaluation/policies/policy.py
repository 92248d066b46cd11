"""What every policy is: a rule for which key-value pairs a model keeps."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

from sparsek_cli.converted import is_converted
from sparsek_cli.errors import SparsekError, UsageError
from sparsek_cli.evaluation.policies.head_budgets import by_layer, per_head, scaled


@dataclass(frozen=True)
class Policy:
    """One row of a result: the same weights under a rule. Subclasses say which rule.

    Attributes:
        budget: total pairs per layer and KV head to set, or None for the checkpoint's own.
        seed: of rules that draw.
        name: as users write it.
        bounded: whether the cache stops growing.
        sparse: whether SparseK attention has to run under it.
        evicts_after_prompt: whether the prompt is read densely and the cache cut when it ends.
        evicts_before_question: whether that is when the context ends, before the question.
        reads_rows: whether prompts of several lengths can be read as rows of one batch.
    """

    budget: int | None = None
    seed: int = 0

    name: ClassVar[str]
    bounded: ClassVar[bool] = True
    sparse: ClassVar[bool] = True
    evicts_after_prompt: ClassVar[bool] = False
    evicts_before_question: ClassVar[bool] = False
    reads_rows: ClassVar[bool] = True

    @property
    def label(self) -> str:
        """Name in tables and folders, e.g. "window-512"."""
        return self.name if self.budget is None else f"{self.name}-{self.budget}"

    @property
    def read_chunk(self) -> int:
        """Tokens of a prompt that are read at once."""
        from sparsek_cli.models.generation.prefill import READ_CHUNK

        return READ_CHUNK

    def unfit_for(self, task: Any) -> str | None:
        """Why the policy cannot be measured on a task of lm-eval, or None."""
        return None

    @contextmanager
    def applied(self, model: Any) -> Iterator[None]:
        """Makes `model` follow the policy inside the block.

        Raises:
            SparsekError: the policy needs a converted model, and this one is not.
        """
        if not is_converted(model.config):
            raise SparsekError(
                f"policy '{self.name}' needs a converted model", hint="run `sparsek convert` first"
            )
        from sparsek_cli import models

        with ExitStack() as stack:
            if not self.sparse:
                stack.enter_context(models.dense_attention(model))
            if self.budget is not None:
                stack.enter_context(models.budget(model, topk=self.topk(model)))
            stack.enter_context(self.rule(model))
            yield

    def rule(self, model: Any) -> AbstractContextManager:
        """What the policy itself changes in `model`, once the budget is set."""
        return nullcontext()

    def topk(self, model: Any) -> int | list:
        """What to select so that a head keeps `budget` pairs on average, spread as it was.

        Raises:
            UsageError: the budget has no room for the model's window and sinks.
        """
        block = model.config.sparsek
        topk = self.budget - block["window"] - block["sinks"]
        if topk < 1:
            raise UsageError(
                f"budget {self.budget} is below the model's window and sinks "
                f"({block['window']} + {block['sinks']}) and one pair to select",
                hint=f"name --budgets of {block['window'] + block['sinks'] + 1} or more",
            )
        return (
            topk
            if isinstance(block["topk"], int)
            else by_layer(model, scaled(per_head(model), topk))
        )

    def new_cache(self, model: Any) -> Any:
        """An empty cache of the kind that the policy uses; call it inside `applied`."""
        from sparsek_cli.models import SparseKCache

        return SparseKCache(model.config)

    def end_prompt(self, model: Any, cache: Any) -> None:
        """Called when a prompt has been read and an answer is about to begin."""

    def most_pairs(self, model: Any) -> int | None:
        """Pairs that all layers and heads may hold together; None without a bound."""
        from sparsek_cli.models.cache.bytes import sliding_pairs

        block = model.config.sparsek
        rows = per_head(model)
        selected = sum(k + block["sinks"] + block["window"] for row in rows for k in row)
        return selected + sliding_pairs(model.config)
