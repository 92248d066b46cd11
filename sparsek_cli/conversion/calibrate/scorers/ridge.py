"""Closed-form maps from the attention block's input to a target: ridge regression, streamed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsek_cli.conversion.calibrate.recorded import Recorded

# Spread of normalised scores: ~0.1 leaves tens of thousands of soft non-zeros, ~10 leaves no
# interior and no gradient (method.md trap 9).
SPREAD = 2.0
# Ridge strength, relative to the number of rows; features are standardised.
_RIDGE = 1e-3


class Moments:
    """Second moments of inputs and targets: X^T X and X^T Y in float64.

    Args:
        hidden: input width. targets: number of target columns.
    """

    def __init__(self, hidden: int, targets: int, device: torch.device):
        self.xx = torch.zeros(hidden + 1, hidden + 1, dtype=torch.float64, device=device)
        self.xy = torch.zeros(hidden + 1, targets, dtype=torch.float64, device=device)

    def add(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """Adds rows: inputs [R, hidden], targets [R, T]."""
        x = torch.nn.functional.pad(inputs.float(), (0, 1), value=1.0)
        # One sequence at a time in float32 (fast), summed in float64 (exact over many).
        self.xx += (x.T @ x).double()
        self.xy += (x.T @ targets.float()).double()

    def __add__(self, other: Moments) -> Moments:
        total = Moments(self.xx.shape[0] - 1, self.xy.shape[1], self.xx.device)
        total.xx = self.xx + other.xx
        total.xy = self.xy + other.xy
        return total

    def covariance(self, other: Moments) -> torch.Tensor:
        """Of the inputs [hidden, hidden], over the rows of both."""
        xx = self.xx + other.xx
        mean = xx[-1, :-1] / xx[-1, -1]
        return xx[:-1, :-1] / xx[-1, -1] - torch.outer(mean, mean)

    def split(self, targets: int) -> tuple[Moments, ...]:
        """The same rows with `targets` of the target columns each, in order."""
        parts = []
        for xy in self.xy.split(targets, dim=1):
            part = Moments(self.xx.shape[0] - 1, targets, self.xx.device)
            part.xx, part.xy = self.xx, xy
            parts.append(part)
        return tuple(parts)

    @property
    def rows(self) -> float:
        """Rows added."""
        return float(self.xx[-1, -1])

    @property
    def finite(self) -> bool:
        """Whether all rows were."""
        return bool(torch.isfinite(self.xx).all())


@dataclass(frozen=True)
class LinearMap:
    """Scores of all KV heads: inputs @ weight.T + bias; weight [G, hidden], bias [G], float64."""

    weight: torch.Tensor
    bias: torch.Tensor

    def __add__(self, other: LinearMap) -> LinearMap:
        return LinearMap(self.weight + other.weight, self.bias + other.bias)

    def scores(self, inputs: torch.Tensor) -> torch.Tensor:
        """[G, N] float32 for inputs [N, hidden]: what the converted model's scorer computes."""
        return (inputs.float() @ self.weight.float().T + self.bias.float()).T

    def of(self, recorded: Recorded) -> torch.Tensor:
        """[G, N] float32 scores of one sequence in one layer."""
        return self.scores(recorded.inputs)

    def normalised(self, moments: Moments) -> LinearMap:
        """The same order with mean 0 and standard deviation `SPREAD` on the rows of `moments`.

        Affine and fixed, so nothing of the sequence leaks into a token's score.
        """
        mean = moments.xx[-1, :-1] / moments.rows
        covariance = moments.xx[:-1, :-1] / moments.rows - torch.outer(mean, mean)
        variance = ((self.weight @ covariance) * self.weight).sum(1)
        scale = SPREAD / variance.clamp_min(1e-12).sqrt()
        weight = self.weight * scale[:, None]
        return LinearMap(weight, -(weight @ mean))


def ridge(moments: Moments) -> LinearMap:
    """Least squares with a penalty on standardised inputs; one solve for all KV heads."""
    rows = moments.rows
    mean_x = moments.xx[-1, :-1] / rows
    mean_y = moments.xy[-1] / rows
    covariance = moments.xx[:-1, :-1] / rows - torch.outer(mean_x, mean_x)
    cross = moments.xy[:-1] / rows - torch.outer(mean_x, mean_y)
    scale = covariance.diagonal().clamp_min(1e-12).sqrt()
    standard = covariance / torch.outer(scale, scale)
    standard.diagonal().add_(_RIDGE)
    solution = torch.linalg.solve(standard, cross / scale[:, None]) / scale[:, None]
    return LinearMap(solution.T.contiguous(), mean_y - mean_x @ solution)
