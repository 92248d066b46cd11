"""The scorers that are written: of each head, its row of the map that was chosen for it."""

from __future__ import annotations

import numpy as np
import torch

from sparsek_cli.conversion.calibrate.head_budgets.choice import Choice
from sparsek_cli.conversion.calibrate.head_budgets.held_out import HeldOut
from sparsek_cli.conversion.calibrate.scorers.linear import Map
from sparsek_cli.conversion.calibrate.scorers.mlp import MlpMap
from sparsek_cli.conversion.write import Scorer


def scorers_of(layers: list[HeldOut], choices: list[Choice]) -> list[Scorer]:
    """One per layer."""
    return [_scorer(layer.maps, choice) for layer, choice in zip(layers, choices, strict=True)]


def _scorer(maps: dict[str, Map], choice: Choice) -> Scorer:
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
    return Scorer(slopes=np.asarray(choice.slopes, dtype=np.float32), topk=choice.topk, **arrays)
