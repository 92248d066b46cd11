"""The likeliest token of each row, and padding behind the end of those that have ended."""

import dataclasses

import torch
from sparsek_kernels.dispatch import explain

_TYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclasses.dataclass
class Ending:
    """Rows end with certain words.

    Attributes:
        running: [B] int64, 1 where the row has not ended; changed in place.
        ends: [E] int64, E >= 1, the words that end a row. pad: what follows, a 0-d int64 tensor.
    """

    running: torch.Tensor
    ends: torch.Tensor
    pad: torch.Tensor

    def follow(self, words: torch.Tensor) -> torch.Tensor:
        """`words` [B] of running rows, padding for the others; counts those that end here."""
        words = words * self.running + self.pad * (1 - self.running)
        self.running.mul_((words[:, None] != self.ends).all(dim=1))
        return words


def likeliest(logits: torch.Tensor, ending: Ending | None = None) -> torch.Tensor:
    """argmax of logits [B, V] over V, int64 [B], by our own kernel where Triton runs.

    Both take NaN for the largest, and the first of equals. With an `ending` rows that have ended
    get padding, and those that end here are counted: as a part of the same launch, for which
    torch takes seven.
    """
    plain = logits.dtype in _TYPES and logits.stride(1) == 1
    if not plain or explain(logits.device, logits.dtype)[0] != "triton":
        words = logits.argmax(dim=-1)
        return words if ending is None else ending.follow(words)
    from sparsek_kernels.triton.decode import likeliest as kernels

    if ending is None:
        return kernels.likeliest(logits)
    return kernels.likeliest(logits, (ending.running, ending.ends, ending.pad))
