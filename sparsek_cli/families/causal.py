"""Whether a config says that tokens see those after them, as embedders made of decoders do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsek_cli.errors import UsageError


def check_causal(config: Mapping[str, Any]) -> None:
    """Raises UsageError where a config dictionary switches causal attention off.

    transformers heeds both keys, `is_causal` in every family; SparseK's selection is causal, and
    would be another model.
    """
    for key, value in (("is_causal", False), ("use_bidirectional_attention", True)):
        found = config.get(key)
        # "vision": images alone are seen ahead, which a text model has none of.
        if found not in (None, "vision") and bool(found) is value:
            raise UsageError(
                f"config.json says {key} {str(found).lower()}: tokens see those after them, and "
                "only causal models can be converted",
                hint="name a model that generates text left to right; if this one does, take the "
                "key out of its config.json",
            )
