"""A decoding step by fewer launches: modules whose weights our own kernels read, one row or a few.

A Llama-like layer becomes one launch for its norm, projections, positions and scores, insertion and
attention, and one each for the output projection, gate and up, and down; what stands alone (a head,
a norm, rotary positions, a map of another kind of layer) is taken by itself. Nothing is believed by
name: a module is taken if it has the parts, and then computes what the kernels compute on random
rows, to rounding. The rest runs as it is.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sparsek_cli.models.generation.fused.compare import (
    TOLERANCE,
    same_layer,
    same_module,
    same_rotary,
)
from sparsek_cli.models.generation.fused.layer import fused_layer
from sparsek_cli.models.generation.fused.parts import (
    Forward,
    fused_map,
    fused_mlp,
    fused_norm,
    fused_rotary,
)

_LOG = logging.getLogger("sparsek_cli")


# What replaces a module, and what finds whether it computes the same.
_TAKEN = (
    (fused_layer, same_layer),
    (fused_mlp, same_module),
    (fused_map, same_module),
    (fused_norm, same_module),
    (fused_rotary, same_rotary),
)


class FusedModules:
    """What replaces modules of a model during a decoding step of `rows` rows.

    Args:
        model: a causal LM with SparseK attention, in eval mode, where Triton runs.

    Attributes:
        taken: how many modules of each class are replaced.
        left: classes of those that could not be, with how many.
    """

    def __init__(self, model: nn.Module, rows: int):
        from sparsek_kernels.triton import linears

        self.taken: Counter[str] = Counter()
        self.left: Counter[str] = Counter()
        self._forwards: list[tuple[nn.Module, Forward]] = []
        if rows > linears.MOST_ROWS:
            self.left[f"all, for {rows} rows are more than {linears.MOST_ROWS}"] = 1
        elif model.dtype not in TOLERANCE:
            self.left[f"all, for weights are {model.dtype}"] = 1
        else:
            with torch.no_grad():
                self._look(model, model, rows)
        counts = (
            ", ".join(f"{count} {name}" for name, count in sorted(some.items())) or "none"
            for some in (self.taken, self.left)
        )
        _LOG.info("fused for steps of %d rows: %s; as they are: %s", rows, *counts)

    def _look(self, model: nn.Module, module: nn.Module, rows: int) -> None:
        """Replaces a module, or what can be replaced below it."""
        for make, equal in _TAKEN:
            forward = make(module, rows)
            if forward is None:
                continue
            if _runs(equal, model, module, forward, rows):
                self._forwards.append((module, forward))
                self.taken[type(module).__name__] += 1
                return
            self.left[type(module).__name__] += 1
        for child in module.children():
            self._look(model, child, rows)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Within the block the model's forward takes the replacements, once.

        A step begins with an embedding, which torch launches: it waits for all before it, so that
        states are at rest between two steps of theirs.
        """
        from sparsek_kernels.triton.launches.overlap import states_at_rest

        for module, forward in self._forwards:
            module.__dict__["forward"] = forward
        try:
            with states_at_rest():
                yield
        finally:
            for module, _ in self._forwards:
                module.__dict__.pop("forward", None)


def _runs(equal: Callable[..., bool], *given: Any) -> bool:
    """What a comparison says; False where the kernels do not compile or fit on this device."""
    try:
        return equal(*given)
    except Exception as error:  # Triton's, ptxas's or the driver's own: the module stays as it is
        _LOG.info("not fused: %s: %s", type(error).__name__, (str(error).splitlines() or [""])[0])
        return False
