"""Captured decoding steps are kept from call to call, while the model is what it was."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparsek_cli.models.generation import why_eager
from sparsek_cli.models.generation.cuda_graphs import Decoder

# Graphs kept per model: each holds its rows' slots and one step's activations.
KEPT_GRAPHS = 2
_graphs: weakref.WeakKeyDictionary[nn.Module, list[Decoder]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


@contextmanager
def decoder_for(
    model: nn.Module,
    batch: int,
    *,
    pick: Any = None,
    compiled: tuple[tuple[str, Any], ...] | None = None,
) -> Iterator[Decoder]:
    """A decoder for the block: one that an earlier call left, if the model is what it was then.

    Args:
        pick: as in `Decoder`, with a hashable `signature`: equal ones can stand for each other.
    """
    if not why_eager.has_graphs(model.device):
        yield Decoder(model, batch, pick=pick, compiled=compiled)
        return
    mode = torch.is_inference_mode_enabled()  # tensors made in it cannot be written outside of it
    signature = (batch, compiled, mode, getattr(pick, "signature", None), _fingerprint(model))
    with _lock:
        kept = _graphs.setdefault(model, [])
        found = next((one for one in kept if one.signature == signature), None)
        if found is not None:
            kept.remove(found)  # nobody else may use its buffers meanwhile
    decoder = found or Decoder(model, batch, pick=pick, compiled=compiled)
    decoder.signature = signature
    yield decoder  # after an error its buffers are not trusted: it is not put back
    if decoder._graph is not None:
        with _lock:
            kept.insert(0, decoder)
            del kept[KEPT_GRAPHS:]


def _fingerprint(model: nn.Module) -> tuple[Any, ...]:
    """All that a captured step depends on: where the weights are, and every module's settings.

    A replay does not look at Python: a scorer put in another's place, an adapter switched off or a
    changed budget must not meet a graph that was captured before.
    """
    config = model.config
    found: list[Any] = [config._attn_implementation, repr(config.sparsek)]
    found.append(id(ALL_ATTENTION_FUNCTIONS[config._attn_implementation]))
    for module in model.modules():
        found.append((id(type(module)), id(module)))
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers"):
                found += [(key, _where(tensor)) for key, tensor in value.items()]
            else:
                found += _settings(name, value)
    return tuple(found)


def _where(tensor: torch.Tensor | None) -> tuple[Any, ...] | None:
    return None if tensor is None else (tensor.data_ptr(), tensor.shape, tensor.dtype)


_PLAIN = (bool, int, float, str, type(None), torch.dtype)


def _settings(name: str, value: Any) -> list[Any]:
    """Plain values, functions, and containers of plain values."""
    if isinstance(value, _PLAIN):
        return [(name, value)]
    if isinstance(value, dict):
        return [(name, key, item) for key, item in value.items() if isinstance(item, _PLAIN)]
    if isinstance(value, (list, tuple, set)):
        return [(name, *(item for item in value if isinstance(item, _PLAIN)))]
    return [(name, id(value))] if callable(value) else []
