"""Kernels of the sparse model, compiled beside other work: the first call of each takes seconds.

Most of compiling does not hold Python's lock. Nothing depends on it: what is not ready is compiled
where it is needed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from threading import Event, Thread
from typing import NamedTuple

import torch

from sparsek_cli.conversion.calibrate.recorded import Recorded
from sparsek_cli.conversion.calibrate.sensitivity.divergence import sparse_attention
from sparsek_cli.conversion.planned import Plan
from sparsek_cli.models.logits import Logits

_LOG = logging.getLogger("sparsek_cli")
# Shares of topk that heads get in turn: what is compiled depends on whether any get nothing.
_SHARES = (0, 0.5, 1, 4)
# Queries in float32 that must find room, so that the work beside it is not left without memory.
_ROOM = 32
_LAST = 10.0  # seconds that one kernel may still take


class Document(NamedTuple):
    """The shape of a document: tokens of its context, turns after it and their length."""

    context: int
    turns: int = 0
    turn_length: int = 0


def compile_ahead(
    plan: Plan,
    logits: Logits,
    inputs: torch.Tensor,
    read: Iterable[Document],
    differentiated: Iterable[Document],
) -> Callable[[], None]:
    """Starts to compile what documents of these shapes will need; on a CPU nothing is compiled.

    Args:
        logits: of the model's attention. inputs: any, of its dtype and device.
        read: shapes of documents that are read. differentiated: with a gradient.

    Returns:
        What ends it, once the kernel under way is done.
    """
    if inputs.device.type != "cuda":
        return lambda: None
    ended = Event()
    wanted = [(document, False) for document in dict.fromkeys(read)]
    wanted += [(document, True) for document in dict.fromkeys(differentiated)]

    def run() -> None:
        try:
            with torch.cuda.device(inputs.device):  # which is a thread's own
                for document, learns in wanted:
                    for odd in (0, 1):  # kernels differ by what numbers are multiples of 16
                        if ended.is_set() or not _has_room(plan, inputs.device, document):
                            return
                        _attend(plan, logits, inputs, document, odd=odd, learns=learns)
        except Exception as error:  # whatever it is: it will be met, and told, where it matters
            _LOG.info("kernels were not compiled ahead: %s", error)

    thread = Thread(target=run, name="compile-ahead", daemon=True)
    thread.start()

    def end() -> None:
        ended.set()
        thread.join(_LAST)

    return end


def _has_room(plan: Plan, device: torch.device, document: Document) -> bool:
    """Whether much more memory is free than attention over one such document takes."""
    free, _ = torch.cuda.mem_get_info(device)
    tokens = document.context + document.turns * document.turn_length
    return free > _ROOM * 4 * tokens * plan.geometry.heads * plan.geometry.head_dim


def _attend(
    plan: Plan, logits: Logits, like: torch.Tensor, document: Document, *, odd: int, learns: bool
) -> None:
    """Sparse attention over random numbers, and its gradient."""
    size = plan.geometry
    tokens = document.context + document.turns * document.turn_length
    # Its own generator: what the search draws must not depend on how far this has come.
    generator = torch.Generator(like.device).manual_seed(odd)
    query, key, value, scores = (
        torch.randn(heads, tokens, *width, dtype=dtype, device=like.device, generator=generator)
        for heads, width, dtype in (
            (size.heads, (size.head_dim,), like.dtype),
            (size.kv_heads, (size.head_dim,), like.dtype),
            (size.kv_heads, (size.head_dim,), like.dtype),
            (size.kv_heads, (), torch.float32),
        )
    )
    shares = [_SHARES[head % len(_SHARES)] for head in range(size.kv_heads)]
    topk = [int(share * plan.topk) + odd for share in shares]
    with torch.enable_grad():
        if learns:
            query, key, value = (x.requires_grad_() for x in (query, key, value))
        recorded = Recorded(
            like, query, key, value, logits, document.turns, document.turn_length
        )  # fmt: skip
        slopes = torch.zeros(size.kv_heads, device=like.device)
        out = sparse_attention(
            recorded, scores, topk=topk, window=plan.window, sinks=plan.sinks, slopes=slopes
        )
        if learns:
            out.sum().backward()
