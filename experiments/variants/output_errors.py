"""Early in a run each layer's attention is drawn towards the teacher's: its outputs, after W_o.

The loss at the model's end says little to a layer whose keys have just been taken away. The error
here is the layer's own, relative to the energy of what the teacher's attention puts out, and its
weight falls to 0 over the first part of a run: later the base may find another way.
"""

from typing import Any

import torch
from transformers import TrainerCallback

from sparsek_cli.models import DENSE_ATTENTION, sparsek_attentions
from sparsek_cli.training.losses.teacher import FrozenTeacher, OwnTeacher

# The part of a run in which it counts.
EARLY = 0.25


class OutputErrors(TrainerCallback):
    """Compares attention outputs of a model's pass with those of the teacher's pass before it.

    One of `Settings.layer_losses`.

    Args:
        model: the SparseK model that is trained. teacher: what runs before it on each batch.
        weight: of the mean error at the first step.
    """

    def __init__(self, model: Any, teacher: OwnTeacher | FrozenTeacher, weight: float):
        self._first = self.weight = weight
        self._dense: dict[int, torch.Tensor] = {}
        self._errors: dict[int, torch.Tensor] = {}
        self._batch = 0
        # A teacher may be the model itself, at another time.
        modules = {*sparsek_attentions(model), *sparsek_attentions(teacher.model)}
        for module in modules:
            module.register_forward_hook(self._keep)

    @property
    def needs_teacher(self) -> bool:
        """Until its weight is 0."""
        return self.weight > 0

    def begin(self, roles: torch.Tensor, bounds: torch.Tensor | None) -> None:
        """Before the teacher's pass over roles [B, N]."""
        self._batch, self._dense, self._errors = len(roles), {}, {}

    def loss(self) -> torch.Tensor | float:
        """Weight times the mean error over layers, summed over sequences; after the pass."""
        if not self._errors:
            return 0.0
        return self.weight * self._batch * torch.stack([*self._errors.values()]).mean()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        progress = state.global_step / max(1, state.max_steps)
        self.weight = self._first * max(0.0, 1 - progress / EARLY)

    def _keep(self, module: Any, args: tuple, output: Any) -> None:
        layer, states = module.layer_idx, output[0] if isinstance(output, tuple) else output
        if self.weight == 0:
            return
        if module.config._attn_implementation == DENSE_ATTENTION:
            self._dense[layer] = states.detach().float()
        elif module.training and layer in self._dense:
            wanted = self._dense[layer]
            error = (states.float() - wanted).square().sum() / wanted.square().sum().clamp_min(1e-9)
            # Checkpointing comes here twice, and needs the same of it.
            self._errors.setdefault(layer, error)
