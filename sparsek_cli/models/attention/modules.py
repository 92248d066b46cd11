"""The attention modules of a model: made sparse in place, and found again."""

from __future__ import annotations

from torch import nn

from sparsek_cli.errors import SparsekError, UsageError
from sparsek_cli.families.by_layer import shared_layers
from sparsek_cli.families.layers import storing_layers
from sparsek_cli.models.attention.sparsek import SparseKAttentionMixin
from sparsek_cli.models.config import sparse_layers
from sparsek_cli.models.heads import check_heads
from sparsek_cli.models.scorer import new_scorer


def add_scorers(base: nn.Module, dense: type, sparse: type, reading: type | None) -> None:
    """Turn `dense` attention modules below `base` into `sparse` ones with a scorer.

    Those without keys of their own become `reading` ones. Layers that slide stay as they are.

    Raises:
        UsageError: no layer attends to everything, or keys are other than the config says.
    """
    layers = sparse_layers(base.config)
    if not layers:
        raise UsageError(
            "no layer of the model attends to everything: there is nothing to convert",
            hint="its cache is bounded already",
        )
    types = getattr(base.config, "layer_types", None) or ()
    readers = storing_layers(types, shared_layers(base.config))
    for module in base.modules():
        if type(module) is dense and module.layer_idx in layers:
            check_heads(module, base.config)
            module.__class__ = sparse
            module.scorer = new_scorer(base.config, module.layer_idx)
            module.is_read = module.layer_idx in readers.values()
        elif type(module) is dense and module.layer_idx in readers:
            module.__class__ = reading


def sparsek_attentions(model: nn.Module) -> list[nn.Module]:
    """The SparseK attention modules of a model (wrapped or not), in order of their layer."""
    found = [module for module in model.modules() if isinstance(module, SparseKAttentionMixin)]
    if not found:
        raise SparsekError(
            f"{type(model).__name__} has no SparseK attention", hint="convert the model first"
        )
    return sorted(found, key=lambda module: module.layer_idx)
