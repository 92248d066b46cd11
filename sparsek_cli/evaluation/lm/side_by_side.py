"""Prompts of nearly one length, read side by side.

Reading one prompt of a small model takes as long as its launches do, whatever the prompt's length:
several at once take hardly longer. Every row ends up in a cache of its own, as if it had been read
alone. Growing caches are padded on the right, where causal attention never looks; SparseK's, which
would keep the padding, on the left, where its attention leaves the padding out.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from sparsek_cli.evaluation.lm.batching import like
from sparsek_cli.evaluation.policies.snapkv_h2o import SnapLayer
from sparsek_cli.models import SparseKCache, rows
from sparsek_cli.models.generation.prefill import READ_CHUNK

# Inner width of the feed-forward layers that READ_CHUNK is for: what is held of a token follows it.
_WIDTH = 8192
SPREAD = 256  # tokens between the longest and the shortest, of which padding is made


def tokens_at_once(config: Any) -> int:
    """How many tokens of all rows may be read in one pass: below 1 GiB of activations."""
    text = config.get_text_config()
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    return READ_CHUNK * _WIDTH // (inner if isinstance(inner, int) else max(inner))


def batches(
    sequences: Sequence[Sequence[int]], members: Sequence[int], *, most: int, tokens: int
) -> list[list[int]]:
    """`members` in groups to be read at once, longest first, so that memory fails early.

    Args:
        sequences: token ids. most: prompts in a group. tokens: in a group, with padding.
    """
    groups: list[list[int]] = []
    for index in sorted(members, key=lambda i: -len(sequences[i])):
        group = groups[-1] if groups else []
        longest = len(sequences[group[0]]) if group else 0
        fits = len(group) < most and (len(group) + 1) * longest <= tokens
        if group and fits and longest - len(sequences[index]) < SPREAD:
            group.append(index)
        else:
            groups.append([index])
    return groups


def can_split(cache: Any) -> bool:
    """Whether the rows of a cache of this kind (an empty one) can go their own ways.

    Not where slots hold codes: what a row loses to them depends on what is read in one pass.
    """
    if isinstance(cache, SparseKCache):
        return cache.all_slots and all(x.budget.cache_dtype != "int8" for x in cache.layers)
    layers = cache.layers
    return bool(layers) and all(type(layer) in (DynamicLayer, SnapLayer) for layer in layers)


@torch.no_grad()
def read(
    model: Any, prompts: Sequence[Sequence[int]], new_cache: Callable[[], Any]
) -> list[tuple[Any, torch.Tensor]]:
    """(cache, logits [1, 1, V] of the first token after it) of each prompt, as if read alone.

    The policy has not been told yet that the prompts have ended.

    Args:
        prompts: token ids, none empty. new_cache: makes an empty cache, one that `can_split`.
    """
    cache = new_cache()
    lengths = [len(prompt) for prompt in prompts]
    if isinstance(cache, SparseKCache):
        return _read_slots(model, prompts, lengths, cache)
    return _read_growing(model, prompts, lengths, cache)


def _read_slots(
    model: Any, prompts: Sequence[Sequence[int]], lengths: list[int], cache: SparseKCache
) -> list[tuple[Any, torch.Tensor]]:
    longest = max(lengths)
    ids = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    places = torch.arange(longest, device=model.device)
    before = longest - torch.tensor(lengths, device=model.device)[:, None]
    padded: dict[str, torch.Tensor] = {}
    if min(lengths) < longest:
        padded["attention_mask"] = (places >= before).long()
        padded["position_ids"] = (places - before).clamp(min=0)
    with _in_one_pass(model):
        logits = model(
            input_ids=torch.tensor(ids, device=model.device), past_key_values=cache,
            use_cache=True, logits_to_keep=1, **padded,
        ).logits  # fmt: skip
    return list(zip(rows(cache), logits.split(1), strict=True))


@contextmanager
def _in_one_pass(model: Any) -> Iterator[None]:
    """Without pieces: what is read at once is bounded already."""
    before, model.read_chunk = model.read_chunk, None
    try:
        yield
    finally:
        model.read_chunk = before


def _read_growing(
    model: Any, prompts: Sequence[Sequence[int]], lengths: list[int], cache: Cache
) -> list[tuple[Any, torch.Tensor]]:
    longest, ends = max(lengths), sorted(set(lengths))
    ids = [list(prompt) + [0] * (longest - len(prompt)) for prompt in prompts]
    for layer in cache.layers:
        if isinstance(layer, SnapLayer):
            layer.padding = longest - min(lengths)
    logits = model(
        input_ids=torch.tensor(ids, device=model.device), past_key_values=cache, use_cache=True,
        logits_to_keep=torch.tensor(ends, device=model.device) - 1,
    ).logits  # fmt: skip
    found = []
    for row, length in enumerate(lengths):
        # Some models of transformers give all logits, whatever is asked for.
        place = ends.index(length) if logits.shape[1] == len(ends) else length - 1
        # A copy: while an answer is written, nothing holds the logits of all others.
        last = logits[row : row + 1, place : place + 1].clone()
        found.append((_row(cache, row, length), last))
    return found


def _row(cache: Cache, row: int, length: int) -> Cache:
    """The first `length` pairs of one row; the tensors are parts of those of `cache`."""
    whole = object.__new__(type(cache))
    Cache.__init__(whole, layers=[like(layer) for layer in cache.layers])
    for layer in whole.layers:
        if isinstance(layer, SnapLayer):
            layer.end_row(row, length)
            continue
        layer.keys = layer.keys[row : row + 1, :, :length]
        layer.values = layer.values[row : row + 1, :, :length]
    return whole
