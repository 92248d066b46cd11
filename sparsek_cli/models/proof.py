"""Proof that SparseK attention ran: its calls are counted, answers alone show nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sparsek_cli.converted import is_converted
from sparsek_cli.errors import SparsekError
from sparsek_cli.models.attention.registration import replaced_attention
from sparsek_cli.models.config import ATTENTION


@dataclass
class Calls:
    """Calls of SparseK attention, and the query positions of all of them, without padding."""

    count: int = 0
    queries: int = 0


@contextmanager
def counted_calls() -> Iterator[Calls]:
    """Counts the calls while the block runs; what replays a CUDA graph makes none."""
    calls = Calls()

    def counting(attend: Callable) -> Callable:
        def counted(
            module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any
        ) -> Any:
            # Layers that slide pass here too, without scores.
            if kwargs.get("sparsek_scores") is not None:
                calls.count += 1
                every = query.shape[0] * query.shape[2]
                calls.queries += every if attention_mask is None else int(attention_mask.sum())
            return attend(module, query, key, value, attention_mask, **kwargs)

        return counted

    with replaced_attention(ATTENTION, counting):
        yield calls


@contextmanager
def proven(model: Any, what: str, *, sparse: bool = True) -> Iterator[None]:
    """Around the work of a model: a converted one must attend as its label says.

    Args:
        model: any causal LM; of a dense one nothing is asked. what: for the message.
        sparse: whether SparseK attention has to run, or must not.

    Raises:
        SparsekError: it was never called, or should not have been.
    """
    with counted_calls() as calls:
        yield
    check_calls(model, calls, what, sparse=sparse)


def check_calls(model: Any, calls: Calls, what: str, *, sparse: bool = True) -> None:
    """As `proven`, for calls that were counted already."""
    if not is_converted(model.config) or bool(calls.count) == sparse:
        return
    name = model.config._attn_implementation
    if sparse:
        raise SparsekError(
            f"{what}: SparseK attention was never called (attention is {name!r})",
            hint="load the model without attn_implementation; `sparsek doctor MODEL` checks it",
        )
    raise SparsekError(
        f"{what}: SparseK attention ran in what should be a dense pass",
        hint="please report this with the command",
    )
