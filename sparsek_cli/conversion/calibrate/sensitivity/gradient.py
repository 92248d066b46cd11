"""Sensitivity by gradient: what the sparse model would lose or gain with other slots for a head.

Errors against dense attention are measured with all other layers dense, and losses of single layers
do not add up to the whole model's. Here all layers are sparse, with the slots of one decision. A
head that had other slots would put out something else; along the gradient of the loss that is, to
first order, what the whole model would gain (g . (o' - o), for all heads and sizes in one backward
pass).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch

from sparsek_cli.conversion.calibrate.layerwise import LayerwiseBase
from sparsek_cli.conversion.calibrate.recorded import Attend, Recorded
from sparsek_cli.conversion.calibrate.sensitivity.divergence import Rows
from sparsek_cli.errors import first_line, out_of_memory

# Whose predictions are differentiated together.
_ROWS = 1024
# One of these is in whatever torch says of a layer that it cannot differentiate, and Triton of a
# kernel that does not fit the device.
_AUTOGRADS_WORDS = (
    "grad", "backward", "derivative", "differentiat", "inplace", "in-place", "out of resource",
)  # fmt: skip


class NoGradients(Exception):
    """The sparse model cannot be differentiated here: no memory, or a layer without a gradient."""


class Gradients:
    """Documents without turns, and their dense predictions; both wait in the CPU's memory.

    Args:
        base: all layers still to be run; the documents are taken from it.
        rows: by number of the document.
        same: numbers of sequences that are the same, where there are any.
    """

    def __init__(
        self, base: LayerwiseBase, rows: Mapping[int, Rows], same: Mapping[int, int] | None = None
    ):
        self._base, self._rows = base, rows
        self._embedded, self._dense = {}, {}
        for number in rows:
            self._dense[number] = base.run_dense(number, (same or {}).get(number)).cpu()
            embedded = base.take(number)
            self._embedded[number] = embedded.cpu()
            self._device = embedded.device
        # Documents count alike, see Whole.divergence; of each kind, those that have rows of it.
        kinds = zip(*rows.values(), strict=True)
        self._documents = [max(1, sum(len(each) > 0 for each in kind)) for kind in kinds]

    def changes(
        self, own: Mapping[int, Attend], others: Mapping[int, list[Attend]], weights: np.ndarray
    ) -> np.ndarray:
        """How the loss would change, to first order, [layers, G, L] float64.

        Args:
            own: attention of each sparse layer as it is. others: the same with L other sizes.
            weights: [2], what a nat of text and of answers counts.

        Raises:
            NoGradients: memory does not suffice, a layer cannot be differentiated, or a gradient
                is not finite. Other errors are mistakes of ours, and pass.
        """
        total = {number: 0.0 for number in own}
        for number, embedded in self._embedded.items():
            hidden = embedded.to(self._device, copy=True)
            try:
                found = self._changes(number, hidden, own, others, weights)
            except (RuntimeError, MemoryError) as error:
                if out_of_memory(error) or any(word in str(error) for word in _AUTOGRADS_WORDS):
                    raise NoGradients(first_line(error)) from error
                raise
            total = {n: total[n] + found[n] for n in own}
        changes = np.stack([total[n].cpu().numpy() for n in own])
        if not np.isfinite(changes).all():
            raise NoGradients("gradients are not finite")
        return changes

    def _changes(
        self,
        number: int,
        hidden: torch.Tensor,
        own: Mapping[int, Attend],
        others: Mapping[int, list[Attend]],
        weights: np.ndarray,
    ) -> dict[int, torch.Tensor]:
        """Of one document, by layer."""
        found: dict[int, torch.Tensor] = {}
        kept: dict[int, tuple[Recorded, torch.Tensor]] = {}
        attend = {n: _probing(found, kept, n, own[n], others[n]) for n in own}
        with torch.enable_grad():
            states = self._base.run_on(number, hidden.requires_grad_(), 0, attend)
            kept.clear()  # every layer is run again, and only then are its inputs needed
            slope = self._slope(number, states.detach(), weights)
            # 16-bit floats know no slope as small as that of a mean over thousands of rows.
            scale = slope.abs().max().clamp_min(1e-30)
            states.backward((slope / scale).to(states.dtype))
        return {n: change * scale.double() for n, change in found.items()}

    def _slope(self, number: int, states: torch.Tensor, weights: np.ndarray) -> torch.Tensor:
        """The gradient [N, hidden] of the loss at the final states, float32."""
        slope = torch.zeros_like(states, dtype=torch.float32)
        dense, predictions = self._dense[number].to(states.device), self._base.predictions
        for rows, weight, among in zip(self._rows[number], weights, self._documents, strict=True):
            for part in rows.split(_ROWS):
                here = states[part].requires_grad_()
                lost = predictions.divergence(predictions.of(dense[part]), here).sum()
                (gradient,) = torch.autograd.grad(lost, here)
                slope[part] += gradient.float() * float(weight / (max(1, len(rows)) * among))
        return slope


def _probing(
    found: dict[int, torch.Tensor],
    kept: dict[int, tuple[Recorded, torch.Tensor]],
    layer: int,
    own: Attend,
    others: list[Attend],
) -> Attend:
    """`own`, which puts into found[layer] what each of the others would change, [G, L].

    In `kept` lies what the layer saw when it was run last: just before its gradient comes. What
    layers with the same keys would change is added up.
    """

    def attend(recorded: Recorded) -> torch.Tensor:
        out = own(recorded)
        if out.requires_grad:
            names = ("inputs", "query", "key", "value")
            alone = {name: getattr(recorded, name).detach() for name in names}
            kept[layer] = replace(recorded, **alone), out.detach()
            out.register_hook(compare)
        return out

    def compare(gradient: torch.Tensor) -> None:
        seen, as_it_is = kept.pop(layer)
        groups = seen.key.shape[0]
        gained = [
            ((other(seen) - as_it_is).float() * gradient.float()).reshape(groups, -1).sum(-1)
            for other in others
        ]
        # Layers that read one layer's keys come here one by one.
        found[layer] = found.get(layer, 0) + torch.stack(gained, -1).double()

    return attend
