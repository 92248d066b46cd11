"""Checks on a converted model before anything is measured: would its numbers mean anything?

Four ways in which a sparse model's numbers mean something else, each found with a short pass or
two: later tokens reach earlier ones through the selection; the scores do not decide what is kept;
the cache grows; a prompt read in pieces leaves pairs in the cache twice, or not at all.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

from sparsek_cli.errors import DAMAGED_OR_TOO_LARGE, SparsekError
from sparsek_cli.evaluation.lm.proof import held
from sparsek_cli.evaluation.policies.policy import Policy
from sparsek_cli.evaluation.policies.registry import OWN, make_policy

BEYOND = 96  # tokens past the budget, so that much is evicted
PIECES = 5  # that a prompt is read in
CHANGED = 32  # last tokens that differ between the two passes of the causality check
MAX_TOKENS = 16_384  # larger budgets are not checked: the passes would cost more than they tell
# Differences that rounding may cause, in units of the logits' spread.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
HALF_TOLERANCE = 0.1


def check_policies(model: Any, policies: Sequence[Policy], max_length: int) -> dict[str, Any]:
    """Soundness of the model at each of its own budgets; {} for a dense model.

    Raises:
        SparsekError: a budget that does not fit, or a model whose numbers would mean nothing.
    """
    checks = {}
    for policy in policies:
        with policy.applied(model):
            if policy.name == OWN:
                checks[policy.label] = check_soundness(model, limit=max_length)
    return checks


def check_soundness(model: Any, *, limit: int, policy: Policy | None = None) -> dict[str, Any]:
    """Runs the four checks; returns what was found, for the record.

    Args:
        model: a converted model. limit: most tokens it takes.
        policy: whose cache to look at; the model's own by default.

    Raises:
        SparsekError: one of them failed.
    """
    from sparsek_cli.models import layer_budget, sparse_layers

    policy = policy or make_policy(OWN)
    budgets = [layer_budget(model.config, i) for i in sparse_layers(model.config)]
    tokens = max(map(_slots, budgets)) + BEYOND
    if tokens > min(limit, MAX_TOKENS):
        return {
            "checked": False,
            "reason": f"{tokens} tokens needed, {min(limit, MAX_TOKENS)} allowed",
        }
    generator = torch.Generator().manual_seed(0)
    draw = {"generator": generator, "dtype": torch.long}
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), **draw).to(model.device)
    leak, growth = _leak_and_growth(model, ids, policy, draw)
    if not math.isfinite(leak):
        raise SparsekError("the model's output is not a number", hint=DAMAGED_OR_TOO_LARGE)
    tolerance = TOLERANCE.get(model.dtype, HALF_TOLERANCE)
    if leak > tolerance:
        raise SparsekError(
            f"changing the last {CHANGED} tokens changed what came before by {leak:.2g} of the "
            "logits' spread: the selection sees the future",
            hint="the scores of this model are not causal; its results would be worthless",
        )
    if growth:
        raise SparsekError(
            f"the cache grew by {growth} bytes in {CHANGED} tokens past its budget",
            hint="report this with the model and the command",
        )
    wrong = _wrong_pairs(model, ids, policy)
    if wrong:
        raise SparsekError(
            f"a prompt read in {PIECES} pieces left {wrong} pairs in the cache twice or not at all",
            hint="report this with the model and the command",
        )
    effect = _score_effect(model, ids)
    # A window alone (topk 0) selects nothing that scores could decide on.
    if effect == 0.0 and any(map(_selected, budgets)):
        raise SparsekError(
            "turning all scores round changed nothing: the scores do not decide what is kept",
            hint="convert the model again; its scorers are empty or not used",
        )
    return {"checked": True, "tokens": tokens, "leak": leak, "score_effect": effect}


def _selected(budget: Any) -> int:
    """Most pairs that a head of a layer selects."""
    return budget.topk if isinstance(budget.topk, int) else max(budget.topk)


def _slots(budget: Any) -> int:
    return budget.sinks + _selected(budget) + budget.window


@torch.no_grad()
def _leak_and_growth(
    model: Any, ids: torch.Tensor, policy: Policy, draw: dict[str, Any]
) -> tuple[float, int]:
    """(largest change of earlier logits over their spread, bytes the cache grew by)."""
    other = ids.clone()
    fresh = torch.randint(0, model.config.vocab_size, (1, CHANGED), **draw)
    other[:, -CHANGED:] = fresh.to(ids.device)
    earlier = ids.shape[1] - CHANGED
    with policy.applied(model):
        first = model(input_ids=ids, use_cache=False).logits[:, :earlier].float()
        second = model(input_ids=other, use_cache=False).logits[:, :earlier].float()
        cache = policy.new_cache(model)
        model(input_ids=ids[:, :earlier], past_key_values=cache, use_cache=True, logits_to_keep=1)
        before = held(cache)[1]
        model(input_ids=ids[:, earlier:], past_key_values=cache, use_cache=True, logits_to_keep=1)
        growth = held(cache)[1] - before
    return float((first - second).abs().max() / first.std().clamp_min(1e-6)), growth


@torch.no_grad()
def _wrong_pairs(model: Any, ids: torch.Tensor, policy: Policy) -> int:
    """Pairs that are in the cache twice or missing, summed over heads, layers and pieces.

    Every head must hold as many different pairs as it has slots, or as there were tokens.
    """
    from sparsek_cli.models import sparse_layers

    wrong = seen = 0
    with policy.applied(model):
        cache = policy.new_cache(model)
        for piece in ids.chunk(PIECES, dim=1):
            model(input_ids=piece, past_key_values=cache, logits_to_keep=1)
            seen += piece.shape[1]
            for layer in (cache.layers[i] for i in sparse_layers(model.config)):
                for slots in layer.state.layout.expand(ids.device):
                    slots = slots.unique()  # a head's own; the others repeat one of them
                    at = layer.state.positions[0, slots]
                    at = at[at >= 0]
                    different = len(at.unique())
                    wrong += len(at) - different + abs(different - min(len(slots), seen))
    return wrong


@torch.no_grad()
def _score_effect(model: Any, ids: torch.Tensor) -> float:
    """Change of the last logits, over their spread, when the worst pairs are kept for the best."""
    from sparsek_cli.models import replaced_scorers

    def last_logits() -> torch.Tensor:
        return model(input_ids=ids, use_cache=False, logits_to_keep=1).logits.float()

    with make_policy(OWN).applied(model):
        plain = last_logits()
        with replaced_scorers(model, lambda attention: _Negated(attention.scorer)):
            turned = last_logits()
    return float((plain - turned).abs().max() / plain.std().clamp_min(1e-6))


class _Negated(torch.nn.Module):
    """A scorer's scores and slopes with the opposite sign; stand-ins as they are."""

    def __init__(self, scorer: Any):
        super().__init__()
        self.scorer = [scorer]  # in a list: no submodule, so it is neither moved nor listed
        self.register_buffer("slopes", -scorer.slopes.detach(), persistent=False)

    def forward(self, hidden_states: torch.Tensor, position_ids: Any = None) -> tuple:
        scores, slopes, *beside = self.scorer[0](hidden_states, position_ids=position_ids)
        return -scores, -slopes, *beside
