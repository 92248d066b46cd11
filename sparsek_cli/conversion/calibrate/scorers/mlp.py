"""Scorers with a hidden layer: a linear map and a small MLP beside it, fitted by gradient descent.

They start as the linear maps that `linear.LinearFit` makes and learn what those leave of the same
targets. The maps of a layer share one hidden layer, so that KV heads may choose among them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from sparsek_cli.conversion.calibrate.recorded import Recorded
from sparsek_cli.conversion.calibrate.scorers.linear import LinearFit, Targets
from sparsek_cli.conversion.calibrate.scorers.ridge import SPREAD, LinearMap
from sparsek_cli.conversion.planned import Plan

# By name: the kinds of rows that a map is fitted to, as in LinearFit; a blend of two has none.
KINDS = {"text": ("text",), "all": ("text", "documents"), "answers": ("answers",)}
_STEPS = {"cpu": 60, "other": 200}
_BATCH = 8192
# Rows kept per layer: 4 GB of bf16 inputs of width 4096.
_ROWS = 1 << 19
# Rows in float32 at one time.
_CHUNK = 1 << 16


@dataclass(frozen=True)
class Hidden:
    """gelu(inputs @ weight.T + bias); weight [width, hidden], bias [width], float32."""

    weight: torch.Tensor
    bias: torch.Tensor

    def of(self, inputs: torch.Tensor) -> torch.Tensor:
        """[N, width] for inputs [N, hidden]."""
        return F.gelu(F.linear(inputs.float(), self.weight, self.bias))


@dataclass(frozen=True)
class MlpMap:
    """Scores of all KV heads: the linear map's, and out [G, width] of the hidden layer."""

    linear: LinearMap
    hidden: Hidden
    out: torch.Tensor

    def of(self, recorded: Recorded) -> torch.Tensor:
        """[G, N] float32: what the converted model's scorer computes."""
        return self.linear.of(recorded) + self.out @ self.hidden.of(recorded.inputs).T


class MlpFit:
    """Collects the rows of one layer; see `linear.Fit`."""

    def __init__(self, plan: Plan, device: torch.device):
        self._linear = LinearFit.of(plan, device)
        self._width = plan.calibration.method.width
        self._steps = _STEPS["cpu" if device.type == "cpu" else "other"]
        self._every = max(1, -(-plan.calibrate_tokens // _ROWS))
        self._inputs: list[torch.Tensor] = []
        self._targets: list[dict[str, torch.Tensor]] = []

    def add(self, recorded: Recorded, targets: Targets) -> None:
        self._linear.add(recorded, targets)
        if targets.answered is None:
            kinds = {"text": targets.everywhere}
        else:
            kinds = {"documents": targets.everywhere, "answers": targets.answered}
        self._inputs.append(recorded.inputs[targets.pairs][:: self._every].clone())
        self._targets.append({kind: y.T[:: self._every] for kind, y in kinds.items()})

    def maps(self) -> dict[str, MlpMap]:
        linear = {name: map_ for name, map_ in self._linear.maps().items() if name in KINDS}
        # What was made in inference mode takes part in no gradient: clones do.
        with torch.inference_mode(False), torch.enable_grad():
            inputs = torch.cat(self._inputs).clone()
            rows = {name: self._rows(KINDS[name]) for name in linear}
            return _fitted(linear, inputs, rows, width=self._width, steps=self._steps)

    def _rows(self, kinds: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Targets [R, G], 0 where there are none, and whether there are [R], of all inputs."""
        targets, known = [], []
        for inputs, given in zip(self._inputs, self._targets, strict=True):
            own = next((given[kind] for kind in kinds if kind in given), None)
            groups = next(iter(given.values())).shape[1]
            targets.append(inputs.new_zeros(len(inputs), groups).float() if own is None else own)
            known.append(torch.full((len(inputs),), own is not None, device=inputs.device))
        return torch.cat(targets).clone(), torch.cat(known).clone()


def _fitted(
    linear: dict[str, LinearMap],
    inputs: torch.Tensor,
    rows: dict[str, tuple[torch.Tensor, torch.Tensor]],
    *,
    width: int,
    steps: int,
) -> dict[str, MlpMap]:
    """All maps, each with mean 0 and deviation `SPREAD` over all inputs [R, hidden]."""
    mean, deviation = _moments(inputs)
    scaled, remains, known = {}, [], []
    for name, (targets, which) in rows.items():
        mine = targets[which]
        targets = (targets - mine.mean(0)) / mine.std(0).clamp_min(1e-6)
        scaled[name], fitted = _regressed(linear[name], inputs, targets, which)
        remains.append(targets - fitted)
        known.append(which)
    hidden, out = _trained(
        (inputs, mean, deviation), torch.stack(remains, 1), torch.stack(known, 1),
        width=width, steps=steps,
    )  # fmt: skip
    weight = hidden.weight.double() / deviation.double()
    bias = hidden.bias.double() - weight @ mean.double()
    layer = Hidden(weight.float(), bias.float())
    parts = out.weight.split(remains[0].shape[1])
    made = [MlpMap(scaled[name], layer, part) for name, part in zip(rows, parts, strict=True)]
    return dict(zip(rows, _normalised(made, inputs), strict=True))


def _trained(
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    remains: torch.Tensor,
    known: torch.Tensor,
    *,
    width: int,
    steps: int,
) -> tuple[nn.Linear, nn.Linear]:
    """A hidden layer on standardised inputs, and an output layer for all maps side by side.

    Args:
        inputs: rows [R, hidden], their mean and deviation.
        remains: [R, maps, G], what is to be learned. known: bool [R, maps], where it is known.
    """
    rows, mean, deviation = inputs
    count, maps, groups = remains.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hidden = nn.Linear(rows.shape[1], width)
        out = nn.Linear(width, maps * groups, bias=False)
    mlp = nn.Sequential(hidden, nn.GELU(), out).to(rows.device)
    nn.init.zeros_(out.weight)
    fused = rows.device.type == "cuda"
    optimiser = torch.optim.AdamW(mlp.parameters(), lr=3e-3, weight_decay=1e-2, fused=fused)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    generator = torch.Generator(rows.device).manual_seed(0)
    for _ in range(steps):
        batch = torch.randint(count, (_BATCH,), generator=generator, device=rows.device)
        made = mlp((rows[batch].float() - mean) / deviation).view(-1, maps, groups)
        weights = known[batch].float()
        errors = (made - remains[batch]).square().mean(2) * weights
        loss = (errors.sum(0) / weights.sum(0).clamp_min(1)).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    mlp.requires_grad_(False)
    return hidden, out


def _regressed(
    linear: LinearMap, inputs: torch.Tensor, targets: torch.Tensor, which: torch.Tensor
) -> tuple[LinearMap, torch.Tensor]:
    """The same order of scores, scaled to come closest to standardised targets; the scores [R, G].

    Args:
        inputs: [R, hidden]. targets: [R, G]. which: bool [R], the rows that have targets.
    """
    linear = LinearMap(linear.weight.clone(), linear.bias.clone())
    scores = _chunked(linear.scores, inputs).T
    mean = scores[which].mean(0)
    centred = scores[which] - mean
    slope = (centred * targets[which]).mean(0) / centred.square().mean(0).clamp_min(1e-9)
    scaled = LinearMap(linear.weight * slope[:, None], (linear.bias - mean) * slope)
    return scaled, (scores - mean) * slope


def _normalised(made: list[MlpMap], inputs: torch.Tensor) -> list[MlpMap]:
    """The same orders with mean 0 and deviation `SPREAD` over `inputs` [R, hidden].

    All have one hidden layer, which is worked out once.
    """

    def scores(part: torch.Tensor) -> torch.Tensor:
        hidden = made[0].hidden.of(part).T
        return torch.cat([one.linear.scores(part) + one.out @ hidden for one in made])

    found = _chunked(scores, inputs).chunk(len(made))
    return [_scaled(one, own) for one, own in zip(made, found, strict=True)]


def _scaled(found: MlpMap, scores: torch.Tensor) -> MlpMap:
    """`found`, whose scores over all inputs are [G, R], with mean 0 and deviation `SPREAD`."""
    scale = (SPREAD / scores.std(1).clamp_min(1e-6)).double()
    linear = LinearMap(
        found.linear.weight * scale[:, None],
        found.linear.bias * scale - scores.mean(1).double() * scale,
    )
    return MlpMap(linear, found.hidden, found.out * scale[:, None].float())


def _moments(inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation [hidden] float32 of rows, which are wide and many: part by part."""
    parts = inputs.split(_CHUNK)
    mean = sum(part.float().sum(0) for part in parts) / len(inputs)
    square = sum((part.float() - mean).square().sum(0) for part in parts) / len(inputs)
    return mean, square.sqrt().clamp_min(1e-6)


def _chunked(scores: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
    """`scores` [G, R] of rows, part by part."""
    return torch.cat([scores(part) for part in inputs.split(_CHUNK)], 1)
