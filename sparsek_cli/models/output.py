"""The output layer: final hidden states to logits, with a family's scaling or soft cap."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch


def output_layer(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """What gives logits [..., vocabulary] for final states [..., hidden] of a causal LM.

    `model(ids).logits` equals it, applied to the base model's last hidden state: scales (Granite,
    Cohere, Falcon-H1) and soft caps (Gemma) count in every loss and every divergence.
    """
    return partial(_logits, model.get_output_embeddings(), model.config)


def _logits(
    layer: Callable[[torch.Tensor], torch.Tensor], config: Any, states: torch.Tensor
) -> torch.Tensor:
    logits = layer(states)
    for name in ("logit_scale", "lm_head_multiplier"):
        factor = getattr(config, name, None)
        if factor is not None:
            logits = logits * factor
    if getattr(config, "logits_scaling", None) is not None:
        logits = logits / config.logits_scaling
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap
