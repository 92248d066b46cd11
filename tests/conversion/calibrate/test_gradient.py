"""What heads would gain with other slots, against the loss of models that have a little of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sparsek_kernels import sparsek_attention

from sparsek_cli.conversion.calibrate import layerwise
from sparsek_cli.conversion.calibrate.effort import Effort
from sparsek_cli.conversion.calibrate.layer_search import LayerSearch
from sparsek_cli.conversion.calibrate.layerwise import LayerwiseBase
from sparsek_cli.conversion.calibrate.recorded import Recorded
from sparsek_cli.conversion.calibrate.scorers.mlp import MlpFit
from sparsek_cli.conversion.calibrate.sensitivity.divergence import Rows, Whole
from sparsek_cli.conversion.calibrate.sensitivity.gradient import Gradients, NoGradients
from sparsek_cli.conversion.calibrate.sequences.sequence import Sequence
from sparsek_cli.conversion.plan import plan as make_plan
from sparsek_cli.recipes.schema_convert import ConvertRecipe

LENGTH = 60


def attention(topk: int):
    """Keys of even places are the best ones."""

    def attend(recorded: Recorded) -> torch.Tensor:
        tensors = recorded.query, recorded.key, recorded.value
        scores = torch.zeros(recorded.key.shape[:2])
        scores[:, ::2] = 1
        return sparsek_attention(
            *(x[None] for x in (*tensors, scores)),
            topk=topk, window=4, sinks=1, **recorded.logits.settings,
        )[0]  # fmt: skip

    return attend


def mixed(own, other, share: float, group: int):
    """`own` with a share of what one KV head's group would put out otherwise."""

    def attend(recorded: Recorded) -> torch.Tensor:
        out, groups = own(recorded), recorded.key.shape[0]
        moved = out.unflatten(0, (groups, -1)).clone()
        there = other(recorded).unflatten(0, (groups, -1))
        moved[group] += share * (there[group] - moved[group])
        return moved.flatten(0, 1)

    return attend


class Unused:
    """In place of a base whose layers fail; there is one document."""

    def __init__(self, error: BaseException | None):
        self.error, self.predictions = error, self

    def run_dense(self, number: int, same: int | None) -> torch.Tensor:
        return torch.zeros(LENGTH, 4)

    def of(self, states: torch.Tensor) -> torch.Tensor:
        return states

    def divergence(self, expected: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        return states.sum(-1)

    def take(self, number: int) -> torch.Tensor:
        return torch.zeros(LENGTH, 4)

    def run_on(self, number: int, hidden: torch.Tensor, first: int, attend: dict) -> torch.Tensor:
        if self.error is not None:
            raise self.error
        return hidden.detach()  # as from a layer that has no gradient


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("out of resource: shared memory, Required: 300000"),
        MemoryError(),
        RuntimeError("a leaf Variable that requires grad is being used in an in-place operation."),
        NotImplementedError("derivative for aten::_scan is not implemented"),
        None,
    ],
)
def test_memory_and_layers_without_a_gradient_are_told(error):
    rows = {0: Rows(torch.arange(2), torch.arange(0))}
    gradients = Gradients(Unused(error), rows)
    with pytest.raises(NoGradients) as caught:
        gradients.changes({0: None}, {0: []}, np.ones(2))
    assert str(caught.value) and "\n" not in str(caught.value)


def test_a_mistake_of_ours_is_not_taken_for_a_layer_without_a_gradient():
    gradients = Gradients(
        Unused(RuntimeError("The size of tensor a (3) must match the size of tensor b (4)")),
        {0: Rows(torch.arange(2), torch.arange(0))},
    )
    with pytest.raises(RuntimeError, match="must match"):
        gradients.changes({0: None}, {0: []}, np.ones(2))


@pytest.mark.parametrize(
    "family",
    [
        "qwen3",
        "gemma3n_text-shared",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("gemma2", "gemma4_text-shared")),
    ],
)
def test_changes_are_slopes_of_the_loss(dense_checkpoint, tmp_path, family):
    recipe = ConvertRecipe(model=str(dense_checkpoint(family)), out=str(tmp_path / "out"))
    plan = make_plan(recipe)
    new = torch.Generator().manual_seed(0)
    ids = [
        torch.randint(3, plan.config["vocab_size"], (tokens,), generator=new)
        for tokens in (LENGTH, LENGTH + 7)
    ]
    rows = {
        n: Rows(torch.arange(10, 40), torch.arange(45, LENGTH)) if n else
        Rows(torch.arange(20, 56), torch.arange(0))
        for n in range(2)
    }  # fmt: skip
    with torch.no_grad():
        base = LayerwiseBase(plan, ids, [(0, 0)] * 2, torch.device("cpu"), torch.float32)
        whole, gradients = Whole(base, rows), Gradients(base, rows)
    assert base.hidden == [None, None]  # taken: no layer moves them on
    own = {n: attention(6) for n in plan.sparse_layers}
    others = {n: [attention(2), attention(6), attention(30)] for n in plan.sparse_layers}
    weights = np.array([0.7, 2.0])
    with torch.no_grad():
        found = gradients.changes(own, others, weights)
    assert found.shape == (len(plan.sparse_layers), plan.geometry.kv_heads, 3)
    assert np.abs(found[..., 1]).max() < 1e-3 * np.abs(found[..., 2]).max()
    share = 1e-2
    for place in (0, len(plan.sparse_layers) - 1):
        number = plan.sparse_layers[place]
        for group in range(plan.geometry.kv_heads):
            for n in (0, 2):
                losses = []
                for sign in (-1, 1):
                    here = mixed(own[number], others[number][n], sign * share, group)
                    with torch.no_grad():
                        losses.append(weights @ whole.divergence(own | {number: here}))
                slope = (losses[1] - losses[0]) / (2 * share)
                assert found[place, group, n] == pytest.approx(slope, rel=0.05, abs=2e-6)


class Losses:
    """In place of a base: what a row loses is known."""

    room = 0

    def __init__(self, *losses: torch.Tensor):
        self.hidden = losses
        self.predictions = self

    def run_dense(self, number: int) -> torch.Tensor:
        return torch.zeros_like(self.hidden[number])

    def run_on(self, number: int, hidden: torch.Tensor, first: int, attend) -> torch.Tensor:
        return hidden

    def nbytes(self, rows: int) -> int:
        return 4 * rows

    def of(self, states: torch.Tensor) -> torch.Tensor:
        return states

    def divergence(self, expected: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        return states - expected


@pytest.mark.parametrize("family", ["qwen3", "gemma3n_text-shared"])
def test_what_the_dense_model_makes_of_a_document_is_worked_out_once(
    dense_checkpoint, tmp_path, monkeypatch, family
):
    """With room for it; the numbers are the same without."""
    plan = make_plan(ConvertRecipe(model=str(dense_checkpoint(family)), out=str(tmp_path / "out")))
    ids = torch.randint(3, plan.config["vocab_size"], (LENGTH,))
    rows = {0: Rows(torch.arange(20, 56), torch.arange(40, 50))}
    attended, dense = [], layerwise.dense_attention
    monkeypatch.setattr(
        layerwise, "dense_attention", lambda recorded: attended.append(1) or dense(recorded)
    )
    found = []
    for room in (0, 1 << 20):
        with torch.no_grad():
            base = LayerwiseBase(
                plan, [ids] * 3, [(0, 0)] * 3, torch.device("cpu"), torch.float32, room
            )
            whole, _ = Whole(base, rows), Gradients(base, {2: rows[0]}, {2: 1})
            attended.clear()
            for layer in range(plan.sparse_layers[-1]):
                if layer in plan.sparse_layers:
                    base.run_layer(layer, range(2), lambda *_: None, advance=True)
                else:
                    base.pass_layer(layer)
            calls = len(attended)
            lost = whole.divergence({plan.sparse_layers[0]: attention(6)})
        found.append((calls, lost, *base.hidden[:2]))
    (calls, lost, *hidden), (fewer, same, *known) = found
    # Of Gemma's layers before the last that is converted each slides.
    assert fewer == 0 and (calls > 0) == (family == "qwen3")
    assert lost.tolist() == same.tolist() and lost.min() > 0
    for one, other in zip(hidden, known, strict=True):
        assert torch.equal(one, other)


def test_documents_count_alike_however_many_answers_they_have():
    base = Losses(torch.full((9,), 1.0), torch.full((9,), 4.0), torch.full((9,), 9.0))
    few, many, none = torch.arange(1), torch.arange(6), torch.arange(0)
    rows = {0: Rows(few, many), 1: Rows(many, few), 2: Rows(few, none)}
    text, answers = Whole(base, rows).divergence({0: None})
    assert (text, answers) == (pytest.approx(14 / 3), pytest.approx(2.5))


def test_a_document_told_again_is_plain_with_one_turn_at_a_time():
    """Context, then the turns, each of which goes on from its end."""
    place, length = np.arange(10 + 4 * 3), 4
    told = Sequence(
        place, place >= 12, place == 10, turns=3, turn_length=length, told=place[:10] > 2
    )
    parts = told.plain(2)
    assert [part.ids[10:].tolist() for part in parts] == [[10, 11, 12, 13], [18, 19, 20, 21]]
    assert all(part.turns == 0 and part.context == 14 for part in parts)
    assert [part.answer.sum() for part in parts] == [2, 4] and parts[0].asking[10]
    assert parts[0].plain(2) == [parts[0]]
    assert [len(part.ids) for part in replace(told).plain(9)] == [14] * 3


def test_slots_are_moved_along_other_documents_than_those_that_judge(dense_checkpoint, tmp_path):
    recipe = ConvertRecipe(
        model=str(dense_checkpoint("qwen3")),
        out=str(tmp_path / "out"),
        topk=8,
        window=8,
        calibrate_tokens=2048,
        calibrate_length=256,
    )
    plan = make_plan(recipe)
    fitting, held_out = ([plain_sequence(n) for n in range(first, first + 4)] for first in (0, 4))
    device = torch.device("cpu")
    for refinements, judging in ((0, 4), (1, 3)):
        made = LayerSearch(
            plan, fitting, held_out, device, torch.float32, MlpFit, Effort(5, refinements)
        )
        assert [*made.whole.inputs()] == [*made.held_out[:judging]]
        refining = made.sequences[made.held_out.stop :]
        assert [s.ids[0] for s in refining] == [s.ids[0] for s in held_out[judging:]]


def plain_sequence(first: int) -> Sequence:
    """Recognised by its first id."""
    ids = np.append(first, np.arange(255) % 50 + 10)
    place = np.arange(256)
    return Sequence(ids, place >= 250, place == 249)
