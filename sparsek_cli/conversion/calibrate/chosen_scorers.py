"""The scorers that are written: of each head, its row of the map that was chosen for it."""

from __future__ import annotations

import numpy as np
import torch

from sparsek_cli.conversion.calibrate.head_budgets.choice import Choice
from sparsek_cli.conversion.calibrate.head_budgets.held_out import HeldOut
from sparsek_cli.conversion.calibrate.scorers.linear import Map
from sparsek_cli.conversion.calibrate.scorers.mlp import MlpMap
from sparsek_cli.conversion.write import Scorer


def scorers_of(
    layers: list[HeldOut], choices: list[Choice], stand_ins: list[np.ndarray] | None = None
) -> list[Scorer]:
    """One per layer."""
    beside = stand_ins or [None] * len(layers)
    each = zip(layers, choices, beside, strict=True)
    return [_scorer(layer.maps, choice, pairs) for layer, choice, pairs in each]


def _scorer(maps: dict[str, Map], choice: Choice, stand_ins: np.ndarray | None) -> Scorer:
    taken = [maps[name] for name in choice.maps]
    linear = [map_.linear if isinstance(map_, MlpMap) else map_ for map_ in taken]
    parts = {
        "weight": torch.stack([map_.weight[head] for head, map_ in enumerate(linear)]),
        "bias": torch.stack([map_.bias[head] for head, map_ in enumerate(linear)]),
    }
    if isinstance(taken[0], MlpMap):
        parts["hidden_weight"], parts["hidden_bias"] = taken[0].hidden.weight, taken[0].hidden.bias
        parts["out_weight"] = torch.stack([map_.out[head] for head, map_ in enumerate(taken)])
    arrays = {name: tensor.float().cpu().numpy() for name, tensor in parts.items()}
    slopes = np.asarray(choice.slopes, dtype=np.float32)
    return Scorer(slopes=slopes, topk=choice.topk, stand_ins=stand_ins, **arrays)
