"""How the next token is drawn from logits."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparsek_cli.errors import DAMAGED_OR_TOO_LARGE, SparsekError

if TYPE_CHECKING:
    import torch


@dataclass
class Sampling:
    """How the next token is drawn; temperature 0 takes the most likely one."""

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    seed: int = 0


def draw(
    logits: "torch.Tensor", sampling: Sampling, generator: "torch.Generator | None" = None
) -> int:
    """One token id from logits [vocabulary], float32: greedy, or nucleus sampling (Holtzman 2020).

    Raises:
        SparsekError: the logits hold NaN.
    """
    import torch

    if torch.isnan(logits).any():
        raise SparsekError(
            "the model's output is not a number",
            hint=DAMAGED_OR_TOO_LARGE,
        )
    if sampling.temperature <= 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits.cpu() / sampling.temperature, dim=-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        # Keep the smallest set whose mass reaches top_p: drop what comes after it was reached.
        # The likeliest one stays, also where top_p is 0 in float32.
        ordered[1:][(ordered.cumsum(0) - ordered)[1:] >= sampling.top_p] = 0
        return int(order[torch.multinomial(ordered, 1, generator=generator)])
    return int(torch.multinomial(probabilities, 1, generator=generator))
