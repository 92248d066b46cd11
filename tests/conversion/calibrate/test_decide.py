"""Who gets how many slots: by errors and what they are worth, then by the whole model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sparsek_cli.conversion.calibrate.effort import Effort
from sparsek_cli.conversion.calibrate.head_budgets import decide as module
from sparsek_cli.conversion.calibrate.head_budgets import refine
from sparsek_cli.conversion.calibrate.head_budgets.by_error import (
    choices_with,
    shares_by_errors,
    sizes_of,
)
from sparsek_cli.conversion.calibrate.head_budgets.by_threshold import (
    FutureAttention,
    threshold_shares,
)
from sparsek_cli.conversion.calibrate.head_budgets.decide import decide
from sparsek_cli.conversion.calibrate.head_budgets.held_out import HeldOut
from sparsek_cli.conversion.calibrate.method import Method
from sparsek_cli.conversion.calibrate.sensitivity.gradient import NoGradients
from sparsek_cli.conversion.plan import plan as make_plan
from sparsek_cli.recipes.schema_convert import ConvertRecipe


def held_out(errors: list[float], worth: float) -> HeldOut:
    """One head's errors by size, in text as at answers, with one candidate."""
    made = HeldOut({}, [[("text", 1.0)]], 1.0, len(errors), 1)
    made.errors[:] = np.asarray(errors)[:, None]
    made.rows[:] = made.stream[:] = 1
    made.worth[:] = worth
    return made


@pytest.fixture
def three_layers(dense_checkpoint, tmp_path):
    """A plan, and layers with the same errors; those of the last cost more in the end."""
    recipe = ConvertRecipe(
        model=str(dense_checkpoint("llama")),
        out=str(tmp_path / "out"),
        topk=8,
        window=8,
        calibrate_length=256,
    )
    plan = make_plan(recipe, Method(sizes=(0, 0.5, 2, 4)))
    plan = replace(plan, geometry=replace(plan.geometry, kv_heads=1), types=plan.types[:1] * 3)
    assert sizes_of(plan) == (0, 4, 8, 16, 32, 244)
    errors = [9.0, 6.0, 4.0, 2.0, 1.0, 0.5]
    return plan, [held_out(errors, worth) for worth in (0.1, 0.1, 1.0)]


def test_slots_go_to_layers_whose_errors_cost_most(three_layers):
    plan, layers = three_layers
    assert shares_by_errors(plan, layers, 0.3).tolist() == [[4], [4], [16]]
    choices = choices_with(plan, layers, np.array([[0], [7], [17]]), 0.3)
    assert [choice.topk for choice in choices] == [(0,), (7,), (17,)]


def test_a_head_gets_as_many_slots_as_pairs_lie_above_the_threshold():
    """One head wants every pair, one none; shares are averages over documents of any length."""
    rng = np.random.default_rng(0)

    def seen(wanted: float, pairs: int) -> np.ndarray:
        return np.where(rng.permutation(pairs) < wanted * pairs, -1.0, -9.0) + rng.random(pairs)

    def layer(*wanted: float) -> list[FutureAttention]:
        return [
            FutureAttention(np.stack([seen(share, pairs) for share in wanted]), 400)
            for pairs in (100, 300)
        ]

    shares = threshold_shares([layer(1.0, 0.0), layer(0.5, 0.1)], 160)
    assert shares.sum() <= 4 * 160
    np.testing.assert_allclose(shares, [[400, 0], [200, 40]], atol=8)


class Scripted:
    """Stands in for `divergence.Whole`: losses in text and at answers, one pair per pass."""

    def __init__(self, *losses: tuple[float, float]):
        self._losses = iter(losses)

    def divergence(self, attend) -> np.ndarray:
        return np.asarray(next(self._losses))


def test_the_whole_model_decides_by_recall_first(three_layers, monkeypatch):
    plan, layers = three_layers
    shape = len(layers), plan.geometry.kv_heads
    proposals = [(str(n), 3.0, np.full(shape, n)) for n in range(1, 11)]
    monkeypatch.setattr(module, "_proposals", lambda *_: proposals)

    def taken(recall: float, *losses: tuple[float, float]) -> tuple[float, float]:
        wanted = replace(plan.calibration, recall=recall)
        whole, effort = Scripted(*losses), Effort(len(losses) - 1, 0)
        made = replace(plan, calibration=wanted)
        report = decide(made, layers, whole, None, effort, lambda passes: None)[1]
        window = report["window_text_loss"], report["window_answer_loss"]
        assert window == losses[0] and len(report["tried"]) == len(losses) - 1
        ends = [report[end]["answer_loss"] for end in ("recall_alone", "text_alone")]
        assert ends[0] <= report["answer_loss"] <= ends[1]
        return report["text_loss"], report["answer_loss"]

    window = (1.0, 9.0)
    keeps, near, drops, worse = (0.8, 1.0), (0.5, 1.2), (0.3, 6.0), (1.1, 0.5)
    rows = (drops, keeps, near, keeps, worse, worse, drops, drops)
    # Worse in text than a plain window is taken only if all are.
    assert taken(0.9, window, *rows) == near
    assert taken(1.0, window, *rows) == keeps
    assert taken(0.0, window, *rows) == drops
    # When none beats the window in text, all of them compete.
    assert taken(1.0, (0.2, 9.0), *rows) == worse


def test_the_default_takes_what_was_better_in_text_and_facts():
    """SmolLM2's ten proposals as they were measured (docs/results/2026-11-public-models.md)."""
    rows = [
        (0.0444, 0.3325), (0.0387, 0.3500), (0.0295, 0.6890), (0.0502, 0.2817), (0.0351, 0.3736),
        (0.0417, 0.3408), (0.0474, 0.3068), (0.0387, 0.3339), (0.0487, 1.0011), (0.0660, 2.2206),
    ]  # fmt: skip
    tried = [proposal(0.1 if row == (0.0295, 0.6890) else 3.0, *row) for row in rows]
    taken = module.best_of(tried, np.asarray([0.0959, 2.3844]), ConvertRecipe().recall)
    assert rows[taken] == (0.0351, 0.3736)


def proposal(weight: float, text: float, answers: float, name: str = "errors") -> dict[str, Any]:
    """A row of what was tried, as far as the choice looks at it."""
    return dict(shares=name, answer_weight=weight, text_loss=text, answer_loss=answers)


@pytest.mark.parametrize(
    "window, rows, taken",
    [
        # A base of 26M at an eighth: 0.1 was taken, and lost a sixth of the facts.
        ((0.0267, 2.3134), ((3.0, 0.0167, 0.2608), (10.0, 0.0121, 0.2761), (0.1, 0.0102, 0.3152),
                            (1.0, 0.0131, 0.2425)), 10.0),
        # At a sixteenth it loses next to nothing there.
        ((0.0533, 4.1868), ((3.0, 0.0217, 0.0670), (10.0, 0.0214, 0.0722), (0.1, 0.0171, 0.0734),
                            (1.0, 0.0191, 0.0697)), 0.1),
        ((0.0530, 3.8680), ((10.0, 0.0289, 0.0854), (0.1, 0.0216, 0.2144)), 10.0),  # `tiny`
    ],
)  # fmt: skip
def test_facts_are_not_sold_for_text(window, rows, taken):
    tried = [proposal(*row) for row in rows]
    recall = ConvertRecipe().recall
    assert tried[module.best_of(tried, np.asarray(window), recall)]["answer_weight"] == taken
    # Refined from the one that was taken, it may lose more there; and text alone takes the best.
    tried.append(proposal(10.0, 0.0001, rows[-1][2] + 0.02, "errors, refined"))
    assert module.best_of(tried, np.asarray(window), recall) == len(rows)
    tried = tried[:-1]
    text = [row["text_loss"] for row in tried]
    assert module.best_of(tried, np.asarray(window), 0.0) == text.index(min(text))


def test_one_decision_is_run_once(three_layers):
    plan, layers = three_layers
    names = [name for name, _, _ in module._proposals(plan, layers)]
    assert names[0] == "errors" and names[-1] == "even"
    whole = Scripted(*[(1.0, 1.0)] * 20)
    tried = decide(plan, layers, whole, None, Effort(len(names), 0), lambda passes: None)[1][
        "tried"
    ]
    assert [row["shares"] for row in tried] == ["errors", "even"]  # all weights share out alike


class Slope:
    """Stands in for `gradient.Gradients`: the last layer's head wants more, the first's less."""

    def changes(self, own, others, weights) -> np.ndarray:
        return np.outer([0.1, 0.2, 1.0], [0.4, 0.1, -0.1, -0.4])[:, None]


def test_slots_move_to_where_the_sparse_model_gains(three_layers, monkeypatch):
    """As long as that is better; names, totals and maps stay, and so does what was best before."""
    plan, layers = three_layers
    shape = len(layers), plan.geometry.kv_heads
    proposals = [("even", 3.0, np.full(shape, plan.topk))]
    monkeypatch.setattr(module, "_proposals", lambda *_: proposals)
    monkeypatch.setattr(refine, "chosen_attention", lambda *_: None)
    better = (0.4, 0.9), (0.9, 0.4), (0.5, 0.5), (0.6, 0.6)
    worse = [(0.8, 0.8)] * refine.WAYS
    passes: list[int] = []
    whole = Scripted((1.0, 1.0), (0.9, 0.9), *better, *worse)
    choices, report = decide(plan, layers, whole, Slope(), Effort(1, 5), passes.append)
    assert (report["text_loss"], report["answer_loss"]) == (0.5, 0.5)  # recall 0.65
    assert report["shares"] == "even, refined" and report["answer_weight"] == 3.0
    first, _, last = (choice.topk[0] for choice in choices)
    assert first < plan.topk < last and sum(c.topk[0] for c in choices) <= 3 * plan.topk
    assert len(report["tried"]) <= len(passes) - 1 < Effort(1, 5).passes  # a second time: no better


def test_a_head_loses_no_slots_that_errors_speak_for(three_layers, monkeypatch):
    """Where a token is predicted for certain, the gradient sees no harm; small steps follow it."""
    plan, layers = three_layers
    monkeypatch.setattr(refine, "chosen_attention", lambda *_: None)
    even = np.full((3, 1), plan.topk)

    def ways() -> tuple[np.ndarray, np.ndarray]:
        choices = choices_with(plan, layers, even, 0.3)
        found = refine.moved_shares(plan, layers, choices, Slope(), np.ones(2))
        assert len(found) == refine.WAYS and all(way.sum() <= even.sum() for way in found)
        return found[0], found[len(refine._BELIEVED_BY_BOTH)]

    layers[0].errors[:] = 0.0  # both agree that the first could lose, and the last gain
    assert all(way[0] < plan.topk < way[2] for way in ways())
    for layer in layers:
        layer.errors[:] = np.asarray([1e6, 1e5, 1e4, 1e3, 1e2, 1e1])[:, None]
        layer.worth[:] = 1.0
    both, alone = ways()
    assert both.tolist() == even.tolist() and alone[0] < plan.topk < alone[2]


def test_where_gradients_fail_what_is_best_so_far_stays(three_layers, monkeypatch):
    """The first time goes well; the second finds no memory."""
    plan, layers = three_layers
    even = np.full((len(layers), 1), plan.topk)
    monkeypatch.setattr(module, "_proposals", lambda *_: [("even", 3.0, even)])
    monkeypatch.setattr(refine, "chosen_attention", lambda *_: None)

    class Short(Slope):
        left = 1

        def changes(self, *given):
            if not self.left:
                raise NoGradients("CUDA out of memory.")
            self.left -= 1
            return super().changes(*given)

    whole = Scripted((1.0, 1.0), (0.9, 0.9), *[(0.5, 0.5)] * refine.WAYS)
    choices, report = decide(plan, layers, whole, Short(), Effort(1, 3), lambda passes: None)
    assert report["not_refined"] == "CUDA out of memory."
    assert report["shares"] == "even, refined" and report["text_loss"] == 0.5
    assert [choice.topk for choice in choices] != [(plan.topk,)] * 3
