"""Scorers that are compared with the linear one and not adopted: an MLP, and keys and values.

Both are fitted and chosen by calibration as the linear ones are (`conversion/calibrate`), and stand
in for them in a loaded model.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from sparsek_cli.conversion.calibrate.collect import Recorded
from sparsek_cli.conversion.calibrate.decide import Choice
from sparsek_cli.conversion.calibrate.fit import LinearFit, Map
from sparsek_cli.conversion.calibrate.maps import SPREAD, LinearMap
from sparsek_cli.conversion.plan import Plan
from sparsek_cli.models import replaced_scorers, set_budget
from sparsek_cli.models.attention import replaced_attention, sparsek_attention_forward
from sparsek_cli.models.config import ATTENTION

MLP_WIDTH = 128
MLP_STEPS = {"cpu": 60, "other": 200}
MLP_BATCH = 8192


class MlpFit:
    """A linear map and a small MLP beside it, trained to the targets that ridge regression has.

    It starts as the linear map (LinearFit's, of the same name), so that it fits no worse.
    """

    def __init__(self, plan: Plan, device: torch.device):
        self._linear = LinearFit(plan, device)
        self._steps = MLP_STEPS["cpu" if device.type == "cpu" else "other"]
        self._rows: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def add(
        self,
        recorded: Recorded,
        span: slice,
        everywhere: torch.Tensor,
        answered: torch.Tensor | None,
    ) -> None:
        self._linear.add(recorded, span, everywhere, answered)
        inputs = recorded.inputs[span].clone()
        kind = "text" if answered is None else "documents"
        self._rows.setdefault(kind, []).append((inputs, everywhere.T))
        if answered is not None:
            self._rows.setdefault("answers", []).append((inputs, answered.T))

    def maps(self) -> dict[str, "MlpMap"]:
        """The maps of LinearFit but the blend, which is the sum of two."""
        linear = self._linear.maps()
        text, documents, answers = (
            self._rows.get(kind, []) for kind in ("text", "documents", "answers")
        )
        rows = {"text": text, "all": text + documents, "answers": answers}
        with torch.inference_mode(False), torch.enable_grad():
            return {
                name: _trained(linear[name], rows[name], text + documents, self._steps)
                for name in linear
                if name in rows
            }


@dataclass(frozen=True)
class MlpMap:
    """Scores (inputs @ linear + MLP(inputs)) * scale + shift."""

    linear: LinearMap
    mlp: nn.Sequential
    mean: torch.Tensor
    deviation: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor

    def of(self, recorded: Recorded) -> torch.Tensor:
        return self.raw(recorded.inputs) * self.scale[:, None] + self.shift[:, None]

    def raw(self, inputs: torch.Tensor) -> torch.Tensor:
        """[G, N] before normalisation."""
        standard = (inputs.float() - self.mean) / self.deviation
        return self.linear.scores(inputs) + self.mlp(standard).T


def _trained(
    linear: LinearMap,
    rows: list[tuple[torch.Tensor, torch.Tensor]],
    spread_over: list[tuple[torch.Tensor, torch.Tensor]],
    steps: int,
) -> MlpMap:
    """Trained to `rows`, with mean 0 and spread `SPREAD` over the inputs of `spread_over`."""
    # Copies: what was made in inference mode takes part in no gradient.
    inputs = torch.cat([x for x, _ in rows]).clone()
    targets = torch.cat([y for _, y in rows]).clone()
    targets = (targets - targets.mean(0)) / targets.std(0).clamp_min(1e-6)
    linear = _regressed(LinearMap(linear.weight.clone(), linear.bias.clone()), inputs, targets)
    remains = targets - linear.scores(inputs).T
    device, groups = inputs.device, targets.shape[1]
    mean, deviation = inputs.float().mean(0), inputs.float().std(0).clamp_min(1e-6)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = nn.Linear(inputs.shape[1], MLP_WIDTH), nn.GELU(), nn.Linear(MLP_WIDTH, groups)
    mlp = nn.Sequential(*layers).to(device)
    nn.init.zeros_(mlp[2].weight)
    nn.init.zeros_(mlp[2].bias)
    optimiser = torch.optim.AdamW(mlp.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    generator = torch.Generator(device).manual_seed(0)
    for _ in range(steps):
        batch = torch.randint(len(inputs), (MLP_BATCH,), generator=generator, device=device)
        loss = F.mse_loss(mlp((inputs[batch].float() - mean) / deviation), remains[batch])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    mlp.requires_grad_(False)
    one, zero = torch.ones(groups, device=device), torch.zeros(groups, device=device)
    made = MlpMap(linear, mlp, mean, deviation, one, zero)
    scores = torch.cat([made.raw(x.clone()) for x, _ in spread_over], 1)
    scale = SPREAD / scores.std(1).clamp_min(1e-6)
    return replace(made, scale=scale, shift=-scores.mean(1) * scale)


def _regressed(linear: LinearMap, inputs: torch.Tensor, targets: torch.Tensor) -> LinearMap:
    """The same order of scores, scaled to come closest to standardised targets [R, G]."""
    scores = linear.scores(inputs).T
    centred = scores - scores.mean(0)
    slope = (centred * targets).mean(0) / centred.square().mean(0).clamp_min(1e-9)
    bias = (linear.bias - scores.mean(0)) * slope
    return LinearMap(linear.weight * slope[:, None], bias)


class KeyValueFit:
    """Ridge regression per KV head on its own key and value (positions encoded) and their norms."""

    def __init__(self, plan: Plan, device: torch.device):
        size = plan.geometry
        width = 2 * size.head_dim + 2
        self._heads = [LinearFit(plan, device, width=width, groups=1) for _ in range(size.kv_heads)]

    def add(
        self,
        recorded: Recorded,
        span: slice,
        everywhere: torch.Tensor,
        answered: torch.Tensor | None,
    ) -> None:
        features = _key_value_features(recorded)
        for head, (fit, inputs) in enumerate(zip(self._heads, features, strict=True)):
            own = slice(head, head + 1)
            fit.add(
                replace(recorded, inputs=inputs),
                span,
                everywhere[own],
                None if answered is None else answered[own],
            )

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


FITS: dict[str, Callable[[Plan, torch.device], Any]] = {"mlp": MlpFit, "keys-values": KeyValueFit}


class _Chosen(nn.Module):
    """The maps that the KV heads of one layer got, as a scorer of a model."""

    def __init__(self, maps: dict[str, Map], choice: Choice):
        super().__init__()
        self.maps, self.choice = maps, choice
        self.register_buffer("slopes", torch.tensor(choice.slopes, dtype=torch.float32))

    def of(self, recorded: Recorded) -> torch.Tensor:
        scores = {name: self.maps[name].of(recorded) for name in set(self.choice.maps)}
        return torch.stack([scores[name][head] for head, name in enumerate(self.choice.maps)])

    def forward(self, hidden_states: torch.Tensor, position_ids: Any = None) -> torch.Tensor:
        """Scores [B, G, N] of the block's input; of keys and values see `in_place_of_linear`."""
        batch, tokens, _ = hidden_states.shape
        if any(isinstance(map_, KeyValueMap) for map_ in self.maps.values()):
            return hidden_states.new_zeros(batch, len(self.slopes), tokens)
        nothing = torch.empty(0)
        flat = Recorded(hidden_states.flatten(0, 1), nothing, nothing, nothing, 1.0)
        return self.of(flat).unflatten(1, (batch, tokens)).transpose(0, 1)


def _key_value_attention(module: nn.Module, query, key, value, mask, **kwargs: Any):
    """`sparsek_attention_forward` with scores from keys [B, G, N, D] and values."""
    batch, _, tokens, _ = key.shape
    flat = [x.transpose(0, 1).flatten(1, 2) for x in (key, value)]
    recorded = Recorded(torch.empty(0), torch.empty(0), *flat, 1.0)
    scores = module.scorer.of(recorded).unflatten(1, (batch, tokens)).transpose(0, 1)
    kwargs["sparsek_scores"] = scores.contiguous()
    return sparsek_attention_forward(module, query, key, value, mask, **kwargs)


@contextmanager
def in_place_of_linear(
    model: Any, maps: list[dict[str, Map]], choices: list[Choice]
) -> Iterator[None]:
    """Within the block a converted model keeps what these maps choose, at the sizes they chose.

    Args:
        maps: of each layer. choices: of each layer, see `calibrate.decide`.
    """
    scorers = [_Chosen(*layer) for layer in zip(maps, choices, strict=True)]
    before = set_budget(model, topk=[list(choice.topk) for choice in choices])["topk"]
    with ExitStack() as stack:
        stack.callback(set_budget, model, topk=before)
        stack.enter_context(replaced_scorers(model, lambda a: scorers[a.layer_idx]))
        if any(isinstance(map_, KeyValueMap) for map_ in maps[0].values()):
            stack.enter_context(replaced_attention(ATTENTION, lambda _: _key_value_attention))
        yield
