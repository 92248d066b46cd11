"""Scorers that are compared with others and not adopted.

Of keys and values; of what queries in the window made of a key; of what comes later.

They are fitted and chosen by calibration as the linear ones are (`conversion/calibrate`), and stand
in for them in a loaded model. `FutureFit` is no scorer that anyone could have: its scores are the
attention that later queries do give each key, measured in the pass that they then decide.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from sparsek_cli.conversion.calibrate.head_budgets.choice import Choice
from sparsek_cli.conversion.calibrate.recorded import Recorded
from sparsek_cli.conversion.calibrate.scorers.linear import LinearFit, Map, Targets
from sparsek_cli.conversion.calibrate.scorers.ridge import SPREAD, LinearMap
from sparsek_cli.conversion.calibrate.scorers.targets import FLOOR, future_attention
from sparsek_cli.conversion.planned import Plan
from sparsek_cli.models import replaced_scorers, set_budget
from sparsek_cli.models.attention.registration import replaced_attention
from sparsek_cli.models.attention.sparsek import sparsek_attention_forward
from sparsek_cli.models.config import ATTENTION
from sparsek_cli.models.logits import Logits


class KeyValueFit:
    """Ridge regression per KV head on its own key and value (positions encoded) and their norms."""

    def __init__(self, plan: Plan, device: torch.device):
        size = plan.geometry
        width = 2 * size.head_dim + 2
        maps = plan.calibration.method.maps
        self._heads = [LinearFit(width, 1, maps, device) for _ in range(size.kv_heads)]

    def add(self, recorded: Recorded, targets: Targets) -> None:
        features = _key_value_features(recorded)
        for head, (fit, inputs) in enumerate(zip(self._heads, features, strict=True)):
            fit.add(replace(recorded, inputs=inputs), targets.of_head(head))

    def maps(self) -> dict[str, "KeyValueMap"]:
        heads = [fit.maps() for fit in self._heads]
        return {name: KeyValueMap(tuple(maps[name] for maps in heads)) for name in heads[0]}


@dataclass(frozen=True)
class KeyValueMap:
    """One linear map per KV head."""

    heads: tuple[LinearMap, ...]

    def of(self, recorded: Recorded) -> torch.Tensor:
        features = _key_value_features(recorded)
        return torch.cat([m.scores(x) for m, x in zip(self.heads, features, strict=True)])


def _key_value_features(recorded: Recorded) -> torch.Tensor:
    """[G, N, 2 D + 2] float32."""
    key, value = recorded.key.float(), recorded.value.float()
    norms = [x.norm(dim=-1, keepdim=True) for x in (key, value)]
    return torch.cat([key, value, *norms], -1)


class FutureFit:
    """The measured future attention as scores: by its largest value, and by its mean.

    Nothing is fitted but the scale of the scores, which slopes are relative to.
    """

    def __init__(self, plan: Plan, device: torch.device):
        self._window = plan.window
        self._seen: dict[str, list[torch.Tensor]] = {name: [] for name in ("max", "mean")}

    def add(self, recorded: Recorded, targets: Targets) -> None:
        for name, seen in self._seen.items():
            seen.append(FutureMap(name, self._window).of(recorded)[:, targets.pairs])

    def maps(self) -> dict[str, "FutureMap"]:
        made = {}
        for name, seen in self._seen.items():
            rows = torch.cat(seen, 1)
            scale = SPREAD / rows.std(1, keepdim=True).clamp_min(1e-6)
            made[name] = FutureMap(name, self._window, rows.mean(1, keepdim=True), scale)
        return made


@dataclass(frozen=True)
class FutureMap:
    """log of the attention that all later queries outside the window give a key, standardised.

    Attributes:
        target: max or mean over these queries and the group's heads. window: newest keys.
        mean, scale: [G, 1] over the calibration text.
    """

    target: str
    window: int
    mean: torch.Tensor | float = 0.0
    scale: torch.Tensor | float = 1.0

    def of(self, recorded: Recorded) -> torch.Tensor:
        tokens = recorded.key.shape[1]
        nothing = torch.zeros(tokens, dtype=torch.bool)
        seen, _ = future_attention(
            recorded, torch.arange(tokens), nothing, self.window, self.target
        )
        # Of the keys of turns nothing is known: they are read once.
        seen = nn.functional.pad(seen, (0, tokens - seen.shape[1]), value=FLOOR)
        return (seen - self.mean) * self.scale


class LeavingFit:
    """Ridge on the block's input and on what queries made of a key until it left the window.

    A key is kept until then anyway, so that its score may wait.
    """

    def __init__(self, plan: Plan, device: torch.device):
        size, maps, self._window = plan.geometry, plan.calibration.method.maps, plan.window
        width = size.hidden + size.heads // size.kv_heads + 2
        self._heads = [LinearFit(width, 1, maps, device) for _ in range(size.kv_heads)]

    def add(self, recorded: Recorded, targets: Targets) -> None:
        features = _leaving_features(recorded, self._window)
        for head, (fit, inputs) in enumerate(zip(self._heads, features, strict=True)):
            fit.add(replace(recorded, inputs=inputs), targets.of_head(head))

    def maps(self) -> dict[str, "LeavingMap"]:
        heads = [fit.maps() for fit in self._heads]
        return {name: LeavingMap(tuple(m[name] for m in heads), self._window) for name in heads[0]}


@dataclass(frozen=True)
class LeavingMap:
    """One linear map per KV head; see `LeavingFit`."""

    heads: tuple[LinearMap, ...]
    window: int

    def of(self, recorded: Recorded) -> torch.Tensor:
        features = _leaving_features(recorded, self.window)
        return torch.cat([m.scores(x) for m, x in zip(self.heads, features, strict=True)])


def _leaving_features(recorded: Recorded, window: int) -> torch.Tensor:
    """[G, N, hidden + heads of the group + 2] float32.

    Beside the input: the key times the mean of the next window - 1 queries, of each head; and log
    of the largest and the mean attention that these give it, over the group's heads.
    """
    (groups, tokens, size), heads = recorded.key.shape, recorded.query.shape[0]
    key, query = recorded.key.float(), recorded.query.float() * recorded.logits.scale
    logits = torch.matmul(query.reshape(groups, -1, size), key.transpose(1, 2))
    logits = recorded.logits.capped(logits.view(groups, heads // groups, tokens, tokens))
    age = torch.arange(tokens, device=key.device)[:, None] - torch.arange(tokens, device=key.device)
    near = (age > 0) & (age < window)
    counts = near.sum(0).clamp_min(1)
    dot = logits.masked_fill(~near, 0).sum(2) / counts
    weights = recorded.logits.weights(logits.masked_fill(age < 0, -torch.inf))
    weights = weights.masked_fill(~near, 0)
    made = torch.stack([weights.amax((1, 2)), weights.mean(1).sum(1) / counts])
    made = made.clamp_min(math.exp(FLOOR)).log()
    inputs = recorded.inputs.float().expand(groups, -1, -1)
    return torch.cat([inputs, dot.transpose(1, 2), made.permute(1, 2, 0)], -1)


FITS: dict[str, Callable[[Plan, torch.device], Any]] = {
    "keys-values": KeyValueFit,
    "leaving": LeavingFit,
    "future": FutureFit,
}
# Maps of what attention sees, not of the block's input.
_OF_ATTENTION = (KeyValueMap, FutureMap, LeavingMap)


class _Chosen(nn.Module):
    """The maps that the KV heads of one layer got, as a scorer of a model."""

    def __init__(self, maps: dict[str, Map], choice: Choice):
        super().__init__()
        self.maps, self.choice = maps, choice
        self.register_buffer("slopes", torch.tensor(choice.slopes, dtype=torch.float32))
        self.inputs: torch.Tensor | None = None

    def of(self, recorded: Recorded) -> torch.Tensor:
        scores = {name: self.maps[name].of(recorded) for name in set(self.choice.maps)}
        return torch.stack([scores[name][head] for head, name in enumerate(self.choice.maps)])

    def forward(self, hidden_states: torch.Tensor, position_ids: Any = None) -> tuple:
        """Scores [B, G, N] of the block's input; maps of attention see `in_place_of_linear`."""
        batch, tokens, _ = hidden_states.shape
        if any(isinstance(map_, _OF_ATTENTION) for map_ in self.maps.values()):
            self.inputs = hidden_states
            return hidden_states.new_zeros(batch, len(self.slopes), tokens), self.slopes
        nothing = torch.empty(0)
        flat = Recorded(hidden_states.flatten(0, 1), nothing, nothing, nothing, Logits(1.0))
        return self.of(flat).unflatten(1, (batch, tokens)).transpose(0, 1), self.slopes


def _recorded_attention(module: nn.Module, query, key, value, mask, **kwargs: Any):
    """`sparsek_attention_forward` with scores of what attention sees, one sequence at a time."""
    logits = Logits.given(query, kwargs)
    rows = zip(module.scorer.inputs, query, key, value, strict=True)
    scores = [module.scorer.of(Recorded(*row, logits)) for row in rows]
    kwargs["sparsek_scores"] = torch.stack(scores)
    return sparsek_attention_forward(module, query, key, value, mask, **kwargs)


@contextmanager
def in_place_of_linear(
    model: Any, maps: list[dict[str, Map]], choices: list[Choice]
) -> Iterator[None]:
    """Within the block a converted model keeps what these maps choose, at the sizes they chose.

    Args:
        maps: of each layer. choices: of each layer, see `calibrate/head_budgets`.
    """
    scorers = [_Chosen(*layer) for layer in zip(maps, choices, strict=True)]
    before = set_budget(model, topk=[list(choice.topk) for choice in choices])["topk"]
    with ExitStack() as stack:
        stack.callback(set_budget, model, topk=before)
        stack.enter_context(replaced_scorers(model, lambda a: scorers[a.layer_idx]))
        if any(isinstance(map_, _OF_ATTENTION) for map_ in maps[0].values()):
            stack.enter_context(replaced_attention(ATTENTION, lambda _: _recorded_attention))
        yield
