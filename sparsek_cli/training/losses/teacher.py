"""The teacher of distillation: the weights a run starts from, with dense attention."""

import copy
from contextlib import contextmanager
from typing import Any

import torch

from sparsek_cli.models import DENSE_ATTENTION, dense_attention
from sparsek_cli.models.output import output_layer
from sparsek_cli.training.losses.objectives import OutputLayer, decoder_of


class OwnTeacher:
    """The model itself without scorers and adapters: for runs in which its base stays frozen.

    Args:
        model: the causal LM that is trained.
        tuner: PEFT's LoraModel around it, or None.
    """

    def __init__(self, model: Any, tuner: Any | None = None):
        self.model, self._tuner = model, tuner

    @property
    def head(self) -> OutputLayer:
        """The output layer."""
        return output_layer(self.model)

    @torch.no_grad()
    def states(self, **inputs: Any) -> torch.Tensor:
        """States below the output layer, [B, N, C]; the arguments are the decoder's."""
        was = [module for module in self.model.modules() if module.training]
        with dense_attention(self.model), self._without_adapters():
            self.model.eval()
            states = decoder_of(self.model)(**inputs, use_cache=False).last_hidden_state
        for module in was:
            module.training = True
        return states

    @contextmanager
    def _without_adapters(self):
        if self._tuner is None:
            yield
            return
        learns = [p for p in self.model.parameters() if p.requires_grad]
        self._tuner.disable_adapter_layers()
        try:
            yield
        finally:
            self._tuner.enable_adapter_layers()
            # PEFT switches requires_grad together with the adapters.
            for parameter in learns:
                parameter.requires_grad_(True)


class FrozenTeacher:
    """A copy of the model as it is now, for runs in which all weights move.

    Not a part of the model: not saved, not sharded, not trained.

    Args:
        model: the causal LM, before training and before its `forward` is replaced.
        dtype: of the copy.
    """

    def __init__(self, model: Any, dtype: torch.dtype):
        self.model = copy.deepcopy(model).to(dtype).eval().requires_grad_(False)
        self.model.config._attn_implementation = DENSE_ATTENTION

    @property
    def head(self) -> OutputLayer:
        """The output layer."""
        return output_layer(self.model)

    @torch.no_grad()
    def states(self, **inputs: Any) -> torch.Tensor:
        """As `OwnTeacher.states`."""
        self.model.to(inputs["input_ids"].device)
        return decoder_of(self.model)(**inputs, use_cache=False).last_hidden_state
