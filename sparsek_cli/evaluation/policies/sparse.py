"""SparseK as converted, and its two baselines: a plain window, and random pairs.

Budgets that differ by head belong to the converted model alone; the others spread the same total
evenly.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

from sparsek_cli.evaluation.policies.head_budgets import as_window, evenly
from sparsek_cli.evaluation.policies.policy import Policy


class SparseK(Policy):
    """The converted model as it is."""

    name: ClassVar[str] = "sparsek"


class SparseK8Bit(SparseK):
    """The converted model, its cache in 8 bits: what that loses."""

    name: ClassVar[str] = "sparsek:int8"
    # Tokens read together see each other's keys as they are, which would hide the loss.
    read_chunk: ClassVar[int] = 256
    reads_rows: ClassVar[bool] = False

    def rule(self, model: Any) -> AbstractContextManager:
        """Keys and values as codes."""
        from sparsek_cli.models import budget

        return budget(model, cache_dtype="int8")


class Window(Policy):
    """Sinks and the newest k + w pairs."""

    name: ClassVar[str] = "window"

    def rule(self, model: Any) -> AbstractContextManager:
        """The model's pairs spent on the newest ones."""
        return as_window(model)


class Random(Policy):
    """Sinks, window and k random pairs."""

    name: ClassVar[str] = "random"

    @contextmanager
    def rule(self, model: Any) -> Iterator[None]:
        """Scores that mean nothing."""
        from sparsek_cli.models import random_scores

        with evenly(model), random_scores(model, self.seed):
            yield
