"""Whether a saved state is one that `save_state` wrote: nothing in the file is believed."""

from __future__ import annotations

import json
from typing import Any

import torch
from sparsek_kernels import SparseKState

from sparsek_cli.models.cache.bytes import slot_dtype
from sparsek_cli.models.config import head_dim, kv_heads

KEYS = ("model", "budgets", "tokens", "heads", "notes")  # of the metadata, beside `format`
SLOTS = ("keys", "values", "positions", "scores", "seen")
SCALES = ("key_scale", "value_scale")  # of 8-bit caches
SUPPORT = ("support", "tau")  # of gates log and kv, where they were known
_MOST_TOKENS = 1 << 31  # positions are int32


class Damaged(ValueError):
    """What of a file cannot be; the message says it."""


def metadata_of(raw: dict[str, str]) -> dict[str, Any]:
    """The metadata with its JSON parsed; `model` is a text.

    Raises:
        Damaged: a key is missing, or is no JSON.
    """
    found: dict[str, Any] = {}
    for key in KEYS:
        if key not in raw:
            raise Damaged(f"it says nothing of its {key}")
        try:
            found[key] = raw[key] if key == "model" else json.loads(raw[key])
        except (ValueError, RecursionError) as error:
            raise Damaged(f"what it says of its {key} is no JSON") from error
    return found


def check_counts(found: dict[str, Any], config: Any, layers: int) -> None:
    """Raises Damaged where layers, tokens or heads are not a cache's of this model."""
    tokens, heads = found["tokens"], found["heads"]
    if heads != [kv_heads(config)] * layers or any(type(n) is not int for n in heads):
        raise Damaged("it has other KV heads than the model")
    if not isinstance(tokens, list) or len(tokens) != layers:
        raise Damaged("its tokens are not counted for each layer")
    if any(type(n) is not int or n != tokens[0] for n in tokens):
        raise Damaged("its layers have not read the same tokens")
    if not 0 < tokens[0] < _MOST_TOKENS:
        raise Damaged(f"it has read {tokens[0]} tokens")


def names_of(layers: int, held: set[str]) -> list[tuple[str, ...]]:
    """The tensors of each layer, by their names in `SparseKState`.

    Raises:
        Damaged: one is missing, or is no part of a state.
    """
    names = []
    for index in range(layers):
        own = [*SLOTS]
        for pair in (SCALES, SUPPORT):
            some = [name for name in pair if f"layers.{index}.{name}" in held]
            own += pair if some else ()
        names.append(tuple(own))
    expected = {f"layers.{index}.{name}" for index, own in enumerate(names) for name in own}
    if odd := sorted(expected ^ held):
        raise Damaged(f"{odd[0][:80]!r} is {'missing' if odd[0] in expected else 'no part of it'}")
    return names


def empty_state(layer: Any, model: Any, batch: int) -> SparseKState:
    """What a layer's state must look like, without memory."""
    budget, config = layer.budget, model.config
    return SparseKState.empty(
        batch,
        kv_heads(config),
        head_dim(config),
        topk=budget.topk,
        window=budget.window,
        sinks=budget.sinks,
        dtype=slot_dtype(budget, model.dtype),
        device="meta",
    )


def check_tensors(tensors: dict[str, torch.Tensor], state: SparseKState, tokens: int) -> None:
    """Raises Damaged where slots are of another shape or type, or hold what no reading leaves.

    Args:
        state: see `empty_state`. tokens: that the layer has read, padding included.
    """
    if state.batch == 0:
        raise Damaged("it holds no text")
    expected = {name: (tuple(t.shape), t.dtype) for name, t in state.slots.items()}
    if "support" in tensors:
        width = tensors["support"].shape[-1] if tensors["support"].dim() else 0
        rows = (state.batch, state.layout.heads)
        expected["support"] = ((*rows, width), torch.float64)
        expected["tau"] = (rows, torch.float64)
    if tensors.keys() != expected.keys():
        odd = sorted(tensors.keys() ^ expected.keys())[0]
        raise Damaged(f"{odd} is {'missing' if odd in expected else 'not of this cache'}")
    for name, tensor in tensors.items():
        if (tuple(tensor.shape), tensor.dtype) != expected[name]:
            shape, dtype = expected[name]
            raise Damaged(
                f"{name} is {list(tensor.shape)} of {_name(tensor.dtype)}, and {list(shape)} of "
                f"{_name(dtype)} in the model's cache"
            )
        _check_values(name, tensor, tokens)


def _check_values(name: str, tensor: torch.Tensor, tokens: int) -> None:
    if tensor.is_floating_point():
        # Scores may be minus infinity, and so may what they are compared with.
        low = name in ("scores", *SUPPORT)
        bad = tensor.isnan() | (tensor.isposinf() if low else tensor.isinf())
        if bool(bad.any()):
            raise Damaged(f"{name} holds values that are no numbers")
    elif name == "positions" and not bool(((tensor >= -1) & (tensor < tokens)).all()):
        raise Damaged("its positions are of tokens that were not read")
    elif name == "seen" and not bool(((tensor >= 0) & (tensor <= tokens)).all()):
        raise Damaged("it has seen more tokens than it has read")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
