"""Candidate maps of one layer, fitted to the targets of its keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from sparsek_cli.conversion.calibrate.recorded import Recorded
from sparsek_cli.conversion.calibrate.scorers.ridge import LinearMap, Moments, ridge
from sparsek_cli.conversion.planned import Plan


class Map(Protocol):
    """From what a layer sees to scores."""

    def of(self, recorded: Recorded) -> torch.Tensor:
        """[G, N] scores of one sequence, with spread `ridge.SPREAD` over the calibration text."""


@dataclass(frozen=True)
class Targets:
    """What scores of some keys of a sequence should be.

    Attributes:
        pairs: [K] int64, places of the keys. everywhere: [G, K] targets over all queries.
        answered: the same over queries at answers; None in plain text.
    """

    pairs: torch.Tensor
    everywhere: torch.Tensor
    answered: torch.Tensor | None

    def of_head(self, head: int) -> Targets:
        """Those of one KV head, G = 1."""
        own = slice(head, head + 1)
        answered = None if self.answered is None else self.answered[own]
        return Targets(self.pairs, self.everywhere[own], answered)


class Fit(Protocol):
    """Collects rows of one layer and turns them into candidate maps; `Fit(plan, device)`."""

    def add(self, recorded: Recorded, targets: Targets) -> None:
        """Adds keys of one sequence."""

    def maps(self) -> dict[str, Map]:
        """Candidates by name. Raises FloatingPointError if rows were not finite."""


class LinearFit:
    """Ridge regression on the attention block's input; maps differ in the rows they are fitted on.

    text: plain text. all: documents with questions too. answers: what answers look at. blend: the
    sum of text and answers.
    """

    def __init__(self, width: int, groups: int, wanted: Sequence[str], device: torch.device):
        """Of inputs so wide, for so many KV heads; `wanted` names maps."""
        self._groups, self._wanted = groups, wanted
        self._text = Moments(width, groups, device)
        self._recall = Moments(width, 2 * groups, device)

    @classmethod
    def of(cls, plan: Plan, device: torch.device) -> LinearFit:
        """For the layers of a conversion."""
        size = plan.geometry
        return cls(size.hidden, size.kv_heads, plan.calibration.method.maps, device)

    def add(self, recorded: Recorded, targets: Targets) -> None:
        inputs = recorded.inputs[targets.pairs]
        if targets.answered is None:
            self._text.add(inputs, targets.everywhere.T)
        else:
            self._recall.add(inputs, torch.cat([targets.everywhere, targets.answered]).T)

    def maps(self) -> dict[str, LinearMap]:
        if not (self._text.finite and self._recall.finite):
            raise FloatingPointError
        if not self._recall.rows:
            return {"text": ridge(self._text).normalised(self._text)}
        everywhere, answered = self._recall.split(self._groups)
        both = self._text + everywhere
        text = self._text if self._text.rows else both
        made = {"text": ridge(text), "all": ridge(both), "answers": ridge(answered)}
        made = {name: map_.normalised(both) for name, map_ in made.items()}
        made["blend"] = (made["text"] + made["answers"]).normalised(both)
        return {name: made[name] for name in self._wanted}

    def nearest(self, present: LinearMap) -> LinearMap:
        """Each KV head's map, of `maps`, whose scores correlate most with those it has at present.

        Raises FloatingPointError if rows were not finite.
        """
        maps = [*self.maps().values()]
        covariance = self._text.covariance(self._recall)
        # Maps have one deviation: the covariance with the present scores orders them.
        likeness = [((m.weight @ covariance) * present.weight).sum(1) for m in maps]
        best = torch.stack(likeness).argmax(0).tolist()
        weight = torch.stack([maps[b].weight[head] for head, b in enumerate(best)])
        bias = torch.stack([maps[b].bias[head] for head, b in enumerate(best)])
        return LinearMap(weight, bias)
