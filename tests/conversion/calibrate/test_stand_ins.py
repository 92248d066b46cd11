"""Stand-ins for evicted pairs: fitted to outputs, kept by heads and models that gain."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from sparsek_kernels import sparsek_attention

from sparsek_cli.conversion.calibrate import run as calibration
from sparsek_cli.conversion.calibrate import stand_ins as module
from sparsek_cli.conversion.calibrate.head_budgets.choice import Choice
from sparsek_cli.conversion.calibrate.recorded import Reading, Recorded
from sparsek_cli.conversion.calibrate.sensitivity.output_error import Slots
from sparsek_cli.conversion.calibrate.stand_ins import OFF, Observed, fitted
from sparsek_cli.conversion.plan import plan as make_plan
from sparsek_cli.conversion.run import run
from sparsek_cli.models.logits import Logits
from sparsek_cli.recipes.schema_convert import ConvertRecipe

HEADS, GROUPS, TOKENS, SIZE = 4, 2, 60, 8
SLOTS = Slots(window=6, sinks=2, sizes=())
ROOM = torch.tensor([20, 20, 20])  # slots; up to 29 tokens are missing below
CHOICE = Choice(("text",) * GROUPS, (0.0,) * GROUPS, (9, 3))


@pytest.mark.parametrize("own", [{}, {"softcap": 2.0, "sinks": torch.arange(HEADS) - 1.0}])
def test_rows_see_what_the_converted_model_sees(own, monkeypatch):
    monkeypatch.setattr(module, "_LOGITS", HEADS * TOKENS * 7)  # some rows at a time
    torch.manual_seed(0)
    q, k, v = (torch.randn(n, TOKENS, SIZE) for n in (HEADS, GROUPS, GROUPS))
    logits = Logits(SIZE**-0.5, **own)
    recorded = Recorded(torch.randn(TOKENS, 16), 2 * q, k, v, logits)
    effective = torch.randn(GROUPS, TOKENS).round().double()  # with ties
    rows = torch.arange(3, TOKENS, 2)
    seen = Observed.joined(
        [*module._observed(Reading(recorded, rows, None), effective, CHOICE, SLOTS)]
    )
    pairs = torch.randn(HEADS, 1, 2 * SIZE + 2)
    settings = dict(topk=CHOICE.topk, window=SLOTS.window, sinks=SLOTS.sinks, **logits.settings)
    tensors = [x[None] for x in (2 * q, k, v, effective)]

    def attended(**more):
        return sparsek_attention(*tensors, **settings | more)[0][:, rows]

    torch.testing.assert_close(seen.kept, attended(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(seen.dense, attended(topk=TOKENS), atol=1e-5, rtol=1e-5)
    pairs[..., -1] = 50.0
    parts = pairs[:, 0, :SIZE], pairs[:, 0, SIZE:-2], pairs[:, 0, -2]
    joined = seen.with_pairs(*parts)
    torch.testing.assert_close(joined, attended(stand_ins=pairs), atol=1e-5, rtol=1e-5)


def observed(rows: int = 400) -> tuple[Observed, tuple[torch.Tensor, ...]]:
    """Queries whose dense outputs one pair explains, and that pair; the last head loses nothing."""
    new = torch.Generator().manual_seed(1)
    query, kept = (torch.randn(3, rows, SIZE, generator=new) for _ in range(2))
    keys, values = (torch.randn(3, SIZE, generator=new) for _ in range(2))
    bias = torch.tensor([0.5, -0.5, 0.0])
    missing = torch.randint(1, 30, (3, rows), generator=new).float().log()
    missing[2] = -torch.inf
    seen = Observed(query, kept, kept, torch.full((3, rows), 3.0), missing)
    dense = seen.with_pairs(keys, values, bias)
    return Observed(query, kept, dense, seen.log_total, missing), (keys, values, bias)


def test_a_pair_that_explains_all_is_found():
    seen, _ = observed()
    found = torch.from_numpy(fitted(seen, ROOM))
    assert found.shape == (3, 1, 2 * SIZE + 2) and found.dtype == torch.float32
    pairs = found[:, 0, :SIZE], found[:, 0, SIZE:-2], found[:, 0, -2]
    assert found[:2, 0, -1].tolist() == pytest.approx([np.log(29)] * 2)  # as far as was seen
    before = (seen.kept - seen.dense)[:2].square().sum()
    after = (seen.with_pairs(*pairs) - seen.dense)[:2].square().sum()
    assert after < 0.05 * before


def test_a_head_that_loses_nothing_and_one_that_gains_nothing_have_none():
    seen, _ = observed()
    same = Observed(seen.query, seen.kept, seen.kept, seen.log_total, seen.log_missing)
    assert (fitted(seen, ROOM)[2] == np.array([0.0] * (2 * SIZE) + [OFF, 0.0])).all()
    assert (fitted(same, ROOM)[..., -2] == OFF).all() and not fitted(same, ROOM)[..., :-2].any()
    assert (fitted(seen, 10 * ROOM)[..., -2] == OFF).all()  # 29 of 200 say little about 1,000
    few = seen.at(torch.arange(20))
    assert (fitted(few, ROOM)[..., -2] == OFF).all()


def test_the_same_rows_give_the_same_pairs():
    seen, _ = observed(rows=2000)  # more than one step looks at
    assert np.array_equal(fitted(seen, ROOM), fitted(seen, ROOM))


@pytest.fixture
def recipe(dense_checkpoint, tmp_path):
    return ConvertRecipe(
        model=str(dense_checkpoint("llama")), out=str(tmp_path / "out"), topk=8, window=8,
        calibrate_length=256, calibrate_tokens=2048, device="cpu",
    )  # fmt: skip


def sparsek_block(folder) -> dict:
    return json.loads((folder / "config.json").read_text())["sparsek"]


def test_they_are_written_where_the_whole_model_loses_less(recipe, tmp_path, monkeypatch):
    done = run(make_plan(recipe))
    report = done.calibration
    assert report["stand_ins"]["taken"]
    assert report["stand_ins"]["without"]["text_loss"] > 0
    assert sparsek_block(tmp_path / "out")["scorer"]["stand_ins"] == 1
    assert "without the stand-ins for evicted pairs" in done.text()
    # What else was tried had none: beside what was taken, with them, it looked the worse.
    assert "weighs them; without stand-ins for text alone" in done.text()


def test_they_are_not_where_it_loses_more_or_nobody_wants_them(recipe, tmp_path, monkeypatch):
    own = calibration.fit_stand_ins

    def harmful(*given):
        found = own(*given)
        for pairs in found:
            pairs[..., -2:] = 9.0
            pairs[..., :-2] = 30.0
        return found

    with monkeypatch.context() as patch:
        patch.setattr(calibration, "fit_stand_ins", harmful)
        done = run(make_plan(recipe))
    assert done.calibration["stand_ins"]["taken"] is False
    assert "stand_ins" not in sparsek_block(tmp_path / "out")["scorer"]
    unwanted = recipe.model_copy(update={"stand_ins": False, "out": str(tmp_path / "other")})
    plain = run(make_plan(unwanted))
    assert "stand_ins" not in plain.calibration and "weighs them; for text alone" in plain.text()
    assert "stand_ins" not in sparsek_block(tmp_path / "other")["scorer"]
