"""torch.compile for decoding steps, without its own CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# Graphs are captured here, so torch.compile must not make its own.
_WITHOUT_GRAPHS = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}


def compile_options(config: Any) -> tuple[tuple[str, Any], ...] | None:
    """What torch.compile is given for a generation config that has a `compile_config`."""
    if config.compile_config is None or config.disable_compile:
        return None
    asked = config.compile_config.to_dict()
    mode = asked.get("mode")
    options = {"mode": _WITHOUT_GRAPHS.get(mode, mode), "backend": asked.get("backend")}
    return tuple((name, value) for name, value in options.items() if value is not None)


_compiled_calls: dict[tuple[type, Any], Callable] = {}


def compiled_forward(kind: type, options: tuple[tuple[str, Any], ...]) -> Callable:
    """The forward of a model class under torch.compile; its guards tell models apart."""
    if (kind, options) not in _compiled_calls:
        compiled = torch.compile(kind.forward, dynamic=False, **dict(options))
        _compiled_calls[kind, options] = compiled
    return _compiled_calls[kind, options]
