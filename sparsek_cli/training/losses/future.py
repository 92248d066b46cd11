"""Scores follow future attention: the objective in which dropped keys have a gradient.

Selection hides what a dropped key would have been worth, so losses on the model's output never
bring it back. The dense teacher sees every key: while it runs, the largest attention that later
queries outside the window give each key is recorded (as calibration does, see
conversion/calibrate/scorers/targets.py), and the scores are pulled towards its order, one layer
at a time: loss = 1 - correlation over the keys of a sequence. A correlation leaves the scale of the
scores, and with it their relation to the slopes, to calibration and the other losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from sparsek_cli.conversion.calibrate.layerwise import Recorded
from sparsek_cli.conversion.calibrate.scorers.targets import future_attention
from sparsek_cli.data import ANSWER
from sparsek_cli.models import sparsek_attentions
from sparsek_cli.models.attention import dense_attention_forward, dense_mask

ATTENTION = "sparsek_observed"
# Queries looked at, per document, beside those that predict an answer.
ROWS = 128
# Keys of the last part have too few later queries for their largest attention to mean much.
_LAST_PART = 8


class FutureAttention:
    """Targets from the teacher's attention, and the loss of the model's scores against them.

    Args:
        model: the SparseK model that is trained.
    """

    def __init__(self, model: Any):
        self._window = model.config.sparsek["window"]
        self._sinks = model.config.sparsek["sinks"]
        self._scorers = {a.layer_idx: a.scorer for a in sparsek_attentions(model)}
        self._inputs: dict[int, torch.Tensor] = {}
        self._active = False
        self._targets: dict[int, list[tuple[torch.Tensor, ...]]] = {}
        self._documents: list[tuple[int, int]] = []
        self._answers = torch.empty(0)
        self._batch = 0
        AttentionInterface.register(ATTENTION, self._attend)
        AttentionMaskInterface.register(ATTENTION, dense_mask)
        self._handles = [
            scorer.register_forward_hook(self._keeper(layer))
            for layer, scorer in self._scorers.items()
        ]

    def close(self) -> None:
        """Leaves the model as it was."""
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def watching(self, roles: torch.Tensor, bounds: torch.Tensor | None) -> Iterator[None]:
        """Around the teacher's and the model's pass over one batch.

        Args:
            roles: [B, N]. bounds: int32 [documents + 1] over all B * N tokens; None: one per row.
        """
        batch, length = roles.shape
        ends = range(0, batch * length + 1, length) if bounds is None else bounds.tolist()
        self._documents = list(zip(ends, ends[1:], strict=False))
        # Row t predicts token t + 1.
        answers = torch.zeros_like(roles, dtype=torch.bool)
        answers[:, :-1] = roles[:, 1:] == ANSWER
        self._answers, self._batch = answers.flatten().cpu(), batch
        self._inputs, self._targets = {}, {}
        self._active = True
        try:
            yield
        finally:
            self._inputs, self._targets = {}, {}
            self._active = False

    def _keeper(self, layer: int) -> Callable:
        def keep(scorer: Any, args: tuple, output: Any) -> None:
            # Inactive while checkpointing runs the layer again for its gradients.
            if self._active:
                self._inputs[layer] = args[0].detach()

        return keep

    def _attend(self, module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any):
        output = dense_attention_forward(module, query, key, value, mask, **kwargs)
        if module.layer_idx not in self._targets:
            scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
            self._targets[module.layer_idx] = self._observe(query, key, scaling)
        return output

    @torch.no_grad()
    def _observe(
        self, query: torch.Tensor, key: torch.Tensor, scaling: float
    ) -> list[tuple[torch.Tensor, ...]]:
        """Per document [G, keys] twice: wanted by any query, and by those that answer."""
        length = query.shape[2]
        found = []
        for start, end in self._documents:
            row, first, last = start // length, start % length, start % length + end - start
            part = slice(first, last)
            answer = self._answers[start:end]
            recorded = Recorded(None, query[row, :, part], key[row, :, part], None, scaling)
            found.append(future_attention(recorded, _rows(answer), answer, self._window))
        return found

    def loss(self) -> torch.Tensor:
        """Sum over sequences of the mean over layers and heads of 1 - correlation, float32."""
        parts = []
        for layer, inputs in self._inputs.items():
            # Anew from a constant input: the loss is this layer's own. No hook runs.
            scores, _ = self._scorers[layer].forward(inputs)
            scores = scores.transpose(0, 1).flatten(1)
            for (start, end), targets in zip(self._documents, self._targets[layer], strict=True):
                share = (end - start) / scores.shape[1] * self._batch
                parts.append(share * self._document(scores[:, start:end], targets))
        return torch.stack(parts).sum() / len(self._inputs)

    def _document(
        self, scores: torch.Tensor, targets: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        tokens = scores.shape[1]
        last = tokens - self._window - tokens // _LAST_PART
        if last - self._sinks < 2:
            return scores.sum() * 0
        keys = slice(self._sinks, last)
        # A head follows what it is nearer to: text and answers want different keys.
        alike = [_correlation(scores[:, keys], target[:, keys]) for target in targets]
        return 1 - torch.maximum(*alike).mean()


def _rows(answer: torch.Tensor) -> torch.Tensor:
    """Evenly spread queries and all that answer, [R] int64 ascending."""
    tokens = len(answer)
    spread = torch.linspace(0, tokens - 1, min(ROWS, tokens)).round().long()
    return torch.cat([spread, answer.nonzero().squeeze(1)]).unique()


def _correlation(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Pearson's, over the last dimension; 0 where one of them is constant."""
    one = one - one.mean(-1, keepdim=True)
    other = other - other.mean(-1, keepdim=True)
    scale = one.square().sum(-1) * other.square().sum(-1)
    return (one * other).sum(-1) * scale.clamp_min(1e-12).rsqrt() * (scale > 1e-12)
