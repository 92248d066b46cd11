"""Stand-ins: a pair per query head for what it no longer sees, fitted to dense outputs.

Once slots are shared out and scores chosen, each layer reads some sequences again. At a sample of
queries that have lost keys, what the kept ones give is compared with what all would: a key, a value
and a bias per query head bring the first nearer to the second. No text passes through a sparse
model for that, and nothing but these numbers is fitted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sparsek_cli.conversion.calibrate import rows
from sparsek_cli.conversion.calibrate.head_budgets.choice import Choice
from sparsek_cli.conversion.calibrate.head_budgets.decide import worth
from sparsek_cli.conversion.calibrate.head_budgets.held_out import HeldOut
from sparsek_cli.conversion.calibrate.layer_search import LayerSearch
from sparsek_cli.conversion.calibrate.recorded import Reading, Recorded
from sparsek_cli.conversion.calibrate.sensitivity.divergence import chosen_attention
from sparsek_cli.conversion.calibrate.sensitivity.output_error import (
    Slots,
    always_visible,
    prefix_ranks,
)

# So low that a pair which could not be fitted, or only did harm, has no share.
OFF = -20.0
# Rows that a head must have lost something at before a pair is fitted to them.
_LEAST_ROWS = 64
# And how many tokens must have been missing there, as a share of its slots.
_LEAST_MISSING = 0.25
_RATE = 0.05
_STEPS = {"cpu": 200, "other": 400}
_BATCH = {"cpu": 768, "other": 4096}  # rows of a step
# Elements of logits [H, rows, N] that exist together.
_LOGITS = 1 << 26


@dataclass(frozen=True)
class Observed:
    """Queries of one layer, of H heads: what they see as they are, and what all keys would give.

    Attributes:
        query: [H, R, D] float32, scaled. kept, dense: outputs, [H, R, D] float32.
        log_total: [H, R], log of the kept softmax' denominator.
        log_missing: [H, R], log of how many tokens do not fit; -inf where all do.
    """

    query: torch.Tensor
    kept: torch.Tensor
    dense: torch.Tensor
    log_total: torch.Tensor
    log_missing: torch.Tensor

    @classmethod
    def joined(cls, parts: list[Observed]) -> Observed:
        """All their rows."""
        return cls(*(torch.cat([getattr(p, n) for p in parts], 1) for n in cls.__annotations__))

    def at(self, picked: torch.Tensor) -> Observed:
        """Some of its rows."""
        return Observed(*(getattr(self, name)[:, picked] for name in self.__annotations__))

    def with_pairs(self, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor):
        """Outputs [H, R, D] with keys and values [H, D] and bias [H] standing in."""
        logits = (self.query * keys[:, None]).sum(-1) + bias[:, None] + self.log_missing
        share = torch.sigmoid(logits - self.log_total)[..., None]
        return self.kept + share * (values[:, None] - self.kept)


def fit_stand_ins(
    search: LayerSearch, layers: list[HeldOut], choices: list[Choice], advance: Callable[[int], Any]
) -> list[np.ndarray]:
    """By sparse layer, pairs [H, 1, 2 D + 2] float32 as `sparsek_attention` takes them.

    Args:
        search: whose sequences are read again. choices: of `layers`, what heads keep.
        advance: called with 1 after each sequence in each layer.
    """
    base, plan = search.base, search.plan
    numbers = search.read_again()
    generator = np.random.default_rng(plan.seed + 2)
    sampled = {
        n: rows.error_rows(
            search.sequences[n], plan.budget, search.can.stand_in_rows, generator
        ).to(search.device)
        for n in numbers
    }
    chosen = dict(zip(plan.sparse_layers, zip(layers, choices, strict=True), strict=True))
    found = []
    for layer in range(base.layers):
        if layer not in chosen:
            base.pass_layer(layer)
            continue
        parts: list[Observed] = []

        def look(number: int, recorded: Recorded, layer: int = layer, parts=parts) -> None:
            held_out, choice = chosen[layer]
            effective = _effective(recorded, held_out, choice)
            for reading in recorded.readings(sampled[number]):
                parts += _observed(reading, reading.of(effective), choice, search.slots)
            advance(1)

        base.run_layer(layer, numbers, look, advance=True)
        room = torch.tensor(chosen[layer][1].topk) + plan.window + plan.sinks
        found.append(fitted(Observed.joined(parts), room))
    return found


def judged(
    search: LayerSearch, layers: list[HeldOut], choices: list[Choice],
    stand_ins: list[np.ndarray], report: dict[str, Any],
) -> tuple[list[np.ndarray] | None, dict[str, Any]]:  # fmt: skip
    """Stand-ins if the whole model loses less with them, text and recall weighed, else None.

    Args:
        report: what `decide` says of the model without them.

    Returns:
        Them, and what they change in the report.
    """
    plan, attend = search.plan, {}
    for number, layer, choice, pairs in zip(
        plan.sparse_layers, layers, choices, stand_ins, strict=True
    ):
        attend[number] = chosen_attention(plan, layer.maps, choice, pairs)
        plain = chosen_attention(plan, layer.maps, choice)
        attend |= {n: plain for n, stored in plan.stored_by.items() if stored == number}
    text, answers = map(float, search.whole.divergence(attend))
    without = {name: report[name] for name in ("text_loss", "answer_loss")}
    window = np.array([report["window_text_loss"], report["window_answer_loss"]])
    weights = worth(plan, window)
    if not weights @ [text, answers] < weights @ [*without.values()]:
        return None, {"stand_ins": {"text_loss": text, "answer_loss": answers, "taken": False}}
    taken = {"stand_ins": {"without": without, "taken": True}}
    return stand_ins, {"text_loss": text, "answer_loss": answers, **taken}


def _effective(recorded: Recorded, layer: HeldOut, choice: Choice) -> torch.Tensor:
    """[G, N] float64 scores + slope * position, as chosen."""
    each = {name: layer.maps[name].of(recorded) for name in set(choice.maps)}
    scores = torch.stack([each[name][head] for head, name in enumerate(choice.maps)]).double()
    slopes = torch.tensor(choice.slopes, dtype=torch.float32, device=scores.device).double()
    return scores + slopes[:, None] * recorded.positions.double()


def _observed(
    reading: Reading, effective: torch.Tensor, choice: Choice, slots: Slots
) -> Iterable[Observed]:
    """What the rows of a plain sequence see, some rows at a time.

    Args:
        effective: [G, N] float64. slots: window and sinks; `choice` has what is selected.
    """
    recorded = reading.recorded
    heads, tokens, size = recorded.query.shape
    groups, logits = recorded.key.shape[0], recorded.logits
    topk = torch.tensor(choice.topk, device=effective.device)
    room = topk + slots.window + slots.sinks
    value = recorded.value.float()[:, None]
    for some in reading.rows.split(max(1, _LOGITS // (heads * tokens))):
        query = recorded.query[:, some].float() * logits.scale
        grouped = query.view(groups, heads // groups, len(some), size)
        every = logits.capped(grouped @ recorded.key.float()[:, None].transpose(2, 3))
        places = torch.arange(tokens, device=some.device)
        every = every.masked_fill(places > some[:, None], -torch.inf)
        seen = prefix_ranks(effective, some, slots) <= topk[:, None, None]
        seen |= always_visible(tokens, some, slots)
        kept = every.masked_fill(~seen[:, None], -torch.inf)
        missing = (some + 1 - room[:, None]).clamp(min=0).float().log()
        yield Observed(
            query=query,
            kept=(logits.weights(kept) @ value).flatten(0, 1),
            dense=(logits.weights(every) @ value).flatten(0, 1),
            log_total=logits.log_total(kept)[..., 0].flatten(0, 1),
            log_missing=missing.repeat_interleave(heads // groups, 0),
        )


# What is made under no_grad has no gradient; the pairs have.
@torch.enable_grad()
def fitted(seen: Observed, room: torch.Tensor) -> np.ndarray:
    """The pair of each head that brings outputs nearest, [H, 1, 2 D + 2]; `OFF` where none does.

    What they are worth grows with what is missing, as far as that was seen.

    Args:
        room: [G], slots of each KV head. Of heads that never miss many more nobody knows what many
            missing pairs would have been worth.
    """
    lost = seen.log_missing > -torch.inf
    count = lost.sum(1)
    most = seen.log_missing.amax(1).exp()
    room = room.to(most).repeat_interleave(len(most) // len(room))
    known = (count >= _LEAST_ROWS) & (most >= _LEAST_MISSING * room)
    before = _errors(seen.kept, seen.dense, lost)
    keys = torch.zeros_like(seen.dense[:, 0])
    values = (seen.dense * lost[..., None]).sum(1) / count.clamp(min=1)[:, None]
    bias = torch.zeros_like(keys[:, 0])
    pairs = [x.clone().requires_grad_() for x in (keys, values, bias)]
    steps, batch = (each["cpu" if keys.is_cpu else "other"] for each in (_STEPS, _BATCH))
    optimizer = torch.optim.Adam(pairs, lr=_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, total_iters=steps)
    drawn = torch.Generator().manual_seed(0)
    size = lost.shape[1]
    for _ in range(steps):
        part, where = seen, lost
        if size > batch:
            picked = torch.randint(size, (batch,), generator=drawn).to(lost.device)
            part, where = seen.at(picked), lost[:, picked]
        errors = _errors(part.with_pairs(*pairs), part.dense, where)
        optimizer.zero_grad()
        (errors / before.clamp(min=1e-12)).sum().backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        after = _errors(seen.with_pairs(*pairs), seen.dense, lost)
        good = (after < before) & known
        keys, values, bias = (x.detach() for x in pairs)
        bias = bias.masked_fill(~good, OFF)
        keys, values = (x.masked_fill(~good[:, None], 0.0) for x in (keys, values))
        limit = most.log().masked_fill(~good, 0.0)
        made = torch.cat([keys, values, bias[:, None], limit[:, None]], 1)[:, None]
    return made.float().cpu().numpy()


def _errors(outputs: torch.Tensor, dense: torch.Tensor, lost: torch.Tensor) -> torch.Tensor:
    """[H], mean squared error at rows that have lost something."""
    errors = (outputs - dense).square().sum(-1) * lost
    return errors.sum(1) / lost.sum(1).clamp(min=1)
