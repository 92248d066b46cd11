"""The output layer: final hidden states to logits, with a family's scaling or soft cap."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from sparsek_cli.families import TABLE
from sparsek_cli.families.own_config import own_value


def output_layer(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """What gives logits [..., vocabulary] for final states [..., hidden] of a causal LM.

    `model(ids).logits` equals it, applied to the base model's last hidden state: scales (Granite,
    Cohere, Falcon-H1, ...) and soft caps (Gemma) count in every loss and every divergence.
    """
    return partial(_logits, model.get_output_embeddings(), model.config)


def _logits(
    layer: Callable[[torch.Tensor], torch.Tensor], config: Any, states: torch.Tensor
) -> torch.Tensor:
    logits = layer(states)
    factors = TABLE.get(config.model_type.removeprefix("sparsek_"), TABLE["llama"]).logit_factors
    for name in factors:
        factor = own_value(config, name)
        if factor is not None:
            logits = logits * factor
    divisor = own_value(config, "logits_scaling")
    if divisor is not None and "logits_scaling" not in factors:
        logits = logits / divisor
    cap = own_value(config, "final_logit_softcapping")
    return logits if cap is None else torch.tanh(logits / cap) * cap
