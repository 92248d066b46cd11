"""Ordinary attention over everything: the reference."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from sparsek_cli.converted import is_converted
from sparsek_cli.evaluation.policies.policy import Policy


class Dense(Policy):
    """Every pair is kept; the cache grows."""

    name: ClassVar[str] = "dense"
    bounded: ClassVar[bool] = False
    sparse: ClassVar[bool] = False

    @contextmanager
    def applied(self, model: Any) -> Iterator[None]:
        """Dense attention inside the block; a model that is not converted has it already."""
        if not is_converted(model.config):
            yield
            return
        from sparsek_cli.models import dense_attention

        with dense_attention(model):
            yield

    def new_cache(self, model: Any) -> Any:
        """transformers' own growing cache."""
        from transformers import DynamicCache

        return DynamicCache(config=model.config)

    def most_pairs(self, model: Any) -> None:
        """No bound."""
        return None
