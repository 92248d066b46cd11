"""What a model predicts from its final states, and how far two predictions are apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F

# Elements of the largest block of logits, 256 MB in float32, and by the kind of device most rows of
# it: what a CPU's caches hold is not written to memory and read again.
_LOGITS = 1 << 26
_ROWS = {"cpu": 256, "other": _LOGITS}


class Predictions:
    """Of one model; `head` makes logits [R, vocabulary] of final states [R, hidden]."""

    def __init__(self, head: Callable[[torch.Tensor], torch.Tensor], vocabulary: int):
        self._head, self._vocabulary = head, vocabulary

    def of(self, states: torch.Tensor) -> Iterator[torch.Tensor]:
        """Log probabilities of the next token, float32 [some, vocabulary], some rows at a time.

        Args:
            states: [R, hidden].
        """
        most = _ROWS["cpu" if states.device.type == "cpu" else "other"]
        for part in states.split(max(1, min(most, _LOGITS // self._vocabulary))):
            yield self._head(part).float().log_softmax(-1)

    def nbytes(self, rows: int) -> int:
        """Bytes of `of` so many rows."""
        return 4 * rows * self._vocabulary

    def divergence(self, expected: Iterable[torch.Tensor], states: torch.Tensor) -> torch.Tensor:
        """KL of what follows from final states [R, hidden] from `expected`, as `of` makes it.

        Nats, float32 [R].
        """
        parts = [
            F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
            for p, q in zip(expected, self.of(states), strict=True)
        ]
        return torch.cat(parts)
