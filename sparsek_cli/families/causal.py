"""Whether a config says that tokens see those after them, as embedders made of decoders do, or what
an encoder read.
"""

from __future__ import annotations

import json
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


def check_alone(config: Mapping[str, Any]) -> None:
    """Raises UsageError where a config dictionary says that a decoder reads what an encoder read.

    No model of the families here has an encoder: of one that says so `generate` asks for its input,
    and GPT-2's class makes attention to it of random weights.
    """
    for key, what in (
        ("is_encoder_decoder", "the model has an encoder"),
        ("add_cross_attention", "the model has cross-attention"),
    ):
        if config.get(key):
            raise UsageError(
                f"config.json says {key} {json.dumps(config[key])[:40]}: {what}, and only "
                "decoder-only models are read here",
                hint=f"take {key} out of config.json if the weights are a decoder alone; else name "
                "a model that is one",
            )
