"""Who gets how many slots: by errors and what they are worth, then by the whole model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sparsek_cli.conversion.calibrate.decide import HeldOut, decide, sizes_of
from sparsek_cli.conversion.calibrate.settle import settle
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
        model=str(dense_checkpoint("llama")), out=str(tmp_path / "out"), topk=8, window=8
    )
    plan = make_plan(recipe)
    plan = replace(plan, geometry=replace(plan.geometry, kv_heads=1))
    assert sizes_of(plan) == (2, 4, 8, 16, 32)
    errors = [8.0, 6.0, 4.0, 2.0, 1.0]
    return plan, [held_out(errors, worth) for worth in (0.1, 0.1, 1.0)]


def test_slots_go_to_layers_whose_errors_cost_most(three_layers):
    plan, layers = three_layers
    assert [choice.topk for choice in decide(plan, layers, 0.3)] == [(4,), (4,), (16,)]
    uniform = decide(plan, layers, 0.3, per_head=False)
    assert [choice.topk for choice in uniform] == [(8,)] * 3


class Scripted:
    """Stands in for `whole.Whole`: losses in text and at answers, one pair per pass."""

    def __init__(self, *losses: tuple[float, float]):
        self._losses = iter(losses)

    def divergence(self, attend) -> np.ndarray:
        return np.asarray(next(self._losses))


def test_the_whole_model_has_the_last_word(three_layers):
    plan, layers = three_layers

    def taken(*losses: tuple[float, float]) -> tuple[float, float]:
        whole = Scripted(*losses)
        _, report = settle(plan, layers, whole, lambda passes: None)
        window = report["window_text_loss"], report["window_answer_loss"]
        assert window == losses[0] and len(report["tried"]) == len(losses) - 1
        return report["text_loss"], report["answer_loss"]

    keeps, near, drops, worse = (0.7, 2.0), (0.6, 2.3), (0.4, 3.0), (1.1, 1.0)
    # The least loss in text, if it keeps answers about as well as any that beats a window.
    assert taken((1.0, 9.0), drops, keeps, near, worse, worse) == near
    assert taken((1.0, 9.0), drops, keeps, keeps, worse, drops) == keeps
    # When none beats the window, answers count alone, and then text.
    assert taken((0.3, 9.0), drops, keeps, near, worse, (1.2, 1.1)) == worse
