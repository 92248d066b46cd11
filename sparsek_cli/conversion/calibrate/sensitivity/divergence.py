"""Sensitivity of the whole model: its KL divergence from dense while some layers are sparse.

An error of one layer's output says which of two choices there is better, not what it costs in the
end: the same error counts many times as much in a layer that predicts or retrieves as in one whose
output later layers hardly use. So a few documents are run to the end with only that layer sparse,
and what is lost there gives its errors their worth, in nats; text and answers apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from sparsek_kernels import SparseKState, sparsek_attention

from sparsek_cli.conversion.calibrate.head_budgets.choice import Choice
from sparsek_cli.conversion.calibrate.layerwise import LayerwiseBase
from sparsek_cli.conversion.calibrate.recorded import Attend, Recorded
from sparsek_cli.conversion.calibrate.scorers.linear import Map
from sparsek_cli.conversion.planned import Plan
from sparsek_cli.errors import SparsekError


class Rows(NamedTuple):
    """Rows [R] int64 of a document that count: in text, and where the next one stands far back."""

    text: torch.Tensor
    answer: torch.Tensor

    def to(self, device: torch.device) -> Rows:
        return Rows(*(rows.to(device) for rows in self))


class Whole:
    """The dense predictions for some documents, and how far a sparse model is from them.

    Args:
        base: all layers still to be run. rows: that count, by number of the document.

    Raises:
        SparsekError: what the dense model says of them is not finite.
    """

    def __init__(self, base: LayerwiseBase, rows: Mapping[int, Rows]):
        self._base, self._rows = base, rows
        self._embedded = self.inputs()
        self._dense = {n: base.run_dense(n) for n in self._embedded}
        if not all(states.isfinite().all() for states in self._dense.values()):
            raise _no_numbers()
        self._kept = self._predicted_once()

    def _predicted_once(self) -> dict[tuple[int, int], list[torch.Tensor]]:
        """Dense predictions by document and kind of its rows, of as many as there is room for."""
        kept, room = {}, self._base.room
        for number, kinds in self._rows.items():
            for kind, rows in enumerate(kinds):
                size = self._base.predictions.nbytes(len(rows))
                if size <= room:
                    kept[number, kind] = [*self._base.predictions.of(self._dense[number][rows])]
                    room -= size
        self._base.room = room
        return kept

    def inputs(self, numbers: Iterable[int] | None = None) -> dict[int, torch.Tensor]:
        """The states [1, N, hidden] of these documents (None: all) before the layer run next."""
        return {number: self._base.hidden[number] for number in numbers or self._rows}

    def divergence(
        self,
        attend: Mapping[int, Attend],
        inputs: Mapping[int, torch.Tensor] | None = None,
        first: int = 0,
    ) -> np.ndarray:
        """Mean KL, nats [2], at rows of text and of answers, with the layers in `attend` replaced.

        Documents count alike: one that is told again has many times the answers of one that asks.

        Args:
            inputs: states before layer `first`; None: run all layers.

        Raises:
            SparsekError: it is no number.
        """
        sums, counts = np.zeros(2), np.zeros(2)
        for number, hidden in (inputs or self._embedded).items():
            states = self._base.run_on(number, hidden, first, attend)
            for kind, rows in enumerate(self._rows[number]):
                if len(rows):
                    expected = self._kept.get((number, kind))
                    if expected is None:
                        expected = self._base.predictions.of(self._dense[number][rows])
                    lost = self._base.predictions.divergence(expected, states[rows])
                    sums[kind] += float(lost.mean())
                    counts[kind] += 1
        if not np.isfinite(sums).all():
            raise _no_numbers()
        return sums / np.maximum(counts, 1)


def _no_numbers() -> SparsekError:
    """Comparisons would choose among numbers that are none."""
    return SparsekError(
        "what the model says of calibration's documents is not finite",
        hint="try --dtype float32; the checkpoint may be damaged",
    )


def chosen_attention(
    plan: Plan, maps: Mapping[str, Map], choice: Choice, stand_ins: np.ndarray | None = None
) -> Attend:
    """Attention over the keys that the KV heads of a layer keep with this choice.

    Args:
        stand_ins: [H, M, 2 D + 2], what stands in for the others; of layers that read these keys
            with queries of their own nothing does.
    """

    def attend(recorded: Recorded) -> torch.Tensor:
        with torch.no_grad():  # which keys are kept is given, where gradients are wanted
            each = {name: maps[name].of(recorded) for name in set(choice.maps)}
            scores = torch.stack([each[name][head] for head, name in enumerate(choice.maps)])
        slopes = torch.tensor(choice.slopes, dtype=torch.float32, device=scores.device)
        more = {}
        if stand_ins is not None:
            more["stand_ins"] = torch.from_numpy(stand_ins).to(scores.device)
        return sparse_attention(
            recorded, scores, topk=choice.topk, window=plan.window, sinks=plan.sinks,
            slopes=slopes, **more,
        )  # fmt: skip

    return attend


def window_attention(plan: Plan) -> Attend:
    """Attention over sinks and the newest keys, with the same total of slots."""

    def attend(recorded: Recorded) -> torch.Tensor:
        scores = torch.zeros(recorded.key.shape[:2], device=recorded.key.device)
        return sparse_attention(
            recorded, scores, topk=0, window=plan.window + plan.topk, sinks=plan.sinks
        )

    return attend


def sparse_attention(recorded: Recorded, scores: torch.Tensor, **settings) -> torch.Tensor:
    """What the converted model computes: turns go on from the state that the context leaves."""
    settings |= recorded.logits.settings
    tensors = (recorded.query, recorded.key, recorded.value, scores)
    if not recorded.turns:
        return sparsek_attention(*(x[None] for x in tensors), **settings)[0]
    contexts, turns = zip(*(recorded.split(x) for x in tensors), strict=True)
    key = recorded.key
    state = SparseKState.empty(
        1, key.shape[0], key.shape[2], dtype=key.dtype, device=key.device,
        topk=settings["topk"], window=settings["window"], sinks=settings["sinks"],
    )  # fmt: skip
    context, state = sparsek_attention(*contexts, state=state, **settings)
    each = torch.zeros(recorded.turns, dtype=torch.int64, device=key.device)
    out, _ = sparsek_attention(*turns, state=state.index_select(each), **settings)
    return recorded.join(context, out)
