"""Loss by position and recall of a model in memory, in a few batched forward passes.

For looking while training, and for experiments. `sparsek evaluate` measures the same through the
cache, token by token, and far more.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from sparsek_cli.data.corpus import Corpus
from sparsek_cli.data.questions import Question
from sparsek_cli.models.output import output_layer
from sparsek_cli.training.losses.objectives import decoder_of

LOGIT_ROWS = 8192  # tokens whose logits exist at one time


def windows(corpus: Corpus, length: int, count: int) -> np.ndarray:
    """At most `count` windows of `length` running tokens, spread evenly over the documents.

    Returns:
        [windows, length] int64; none overlaps another and none crosses a document's end.
    """
    starts = [
        begin
        for first, last in zip(corpus.starts.tolist(), corpus.ends.tolist(), strict=True)
        for begin in range(first, last - length + 1, length)
    ]
    chosen = np.linspace(0, len(starts) - 1, min(count, len(starts))).round().astype(int)
    rows = [corpus.tokens[starts[i] : starts[i] + length] for i in chosen]
    return np.stack(rows).astype(np.int64) if rows else np.empty((0, length), dtype=np.int64)


@torch.no_grad()
def token_losses(model: Any, rows: np.ndarray, *, batch_tokens: int = 65_536) -> torch.Tensor:
    """Loss of every token given those before it, nats: float32 [rows, N - 1] on the CPU.

    Args:
        model: a causal LM in eval mode.
        rows: [rows, N] token ids.
        batch_tokens: how many go through the model together.
    """
    device = model.get_output_embeddings().weight.device
    size = max(1, batch_tokens // rows.shape[1])
    losses = []
    for first in range(0, len(rows), size):
        ids = torch.from_numpy(rows[first : first + size]).to(device)
        states = decoder_of(model)(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        pieces = [
            F.cross_entropy(logits, target, reduction="none")
            for logits, target in _by_chunks(model, states.flatten(0, 1), ids[:, 1:].flatten())
        ]
        losses.append(torch.cat(pieces).view(len(ids), -1).cpu())
    return torch.cat(losses)


@torch.no_grad()
def recalled(
    model: Any, questions: Sequence[Question], *, batch_tokens: int = 65_536
) -> np.ndarray:
    """Whether the model answers each question word for word, bool [questions].

    Args:
        model: a causal LM in eval mode.
        batch_tokens: how many go through the model together.
    """
    device = model.get_output_embeddings().weight.device
    right = np.zeros(len(questions), dtype=bool)
    # Of similar length together; what is padded on the right is seen by nobody before it.
    order = sorted(range(len(questions)), key=lambda i: len(questions[i].ids))
    for batch in _batches(order, questions, batch_tokens):
        longest = max(len(questions[i].ids) for i in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        for row, i in enumerate(batch):
            ids[row, : len(questions[i].ids)] = torch.from_numpy(questions[i].ids)
        ids = ids.to(device)
        states = decoder_of(model)(input_ids=ids, use_cache=False).last_hidden_state
        for row, i in enumerate(batch):
            asked = slice(questions[i].start, len(questions[i].ids))
            before = slice(asked.start - 1, asked.stop - 1)
            said = output_layer(model)(states[row, before]).argmax(-1)
            right[i] = bool((said == ids[row, asked]).all())
    return right


def _by_chunks(
    model: Any, states: torch.Tensor, targets: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    head = output_layer(model)
    for piece, target in zip(states.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True):
        yield head(piece).float(), target


def _batches(
    order: Iterable[int], questions: Sequence[Question], batch_tokens: int
) -> Iterator[list[int]]:
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) + 1) * len(questions[i].ids) > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
