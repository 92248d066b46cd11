"""Where sums are float32 on purpose, autocast must not turn them into bf16."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

_NOTHING = nullcontext()


def without_autocast(device_type: str) -> AbstractContextManager:
    """A context without autocast; where there is none it does nothing, which takes no time."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return _NOTHING
