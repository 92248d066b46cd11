"""Calibration: targets, selection and maps against plain definitions, and what it is good for."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsek_cli.console import Console
from sparsek_cli.conversion.calibrate.allot import allot
from sparsek_cli.conversion.calibrate.choose import (
    Slots,
    always_visible,
    output_errors,
    prefix_ranks,
)
from sparsek_cli.conversion.calibrate.collect import Recorded
from sparsek_cli.conversion.calibrate.decide import HeldOut, decide, sizes_of
from sparsek_cli.conversion.calibrate.maps import SPREAD, Moments, ridge
from sparsek_cli.conversion.calibrate.sequences import calibration_sequences
from sparsek_cli.conversion.calibrate.settle import settle
from sparsek_cli.conversion.calibrate.targets import FLOOR, future_attention
from sparsek_cli.conversion.plan import make_plan
from sparsek_cli.hub import resolve
from sparsek_cli.recipes.schema_convert import ConvertRecipe

STORIES = Path(
    os.environ.get(
        "SPARSEK_TEST_STORIES",
        Path(__file__).parents[3] / "shared" / "models" / "stories260k-hf",
    )
)
HEADS, GROUPS, TOKENS, SIZE, WINDOW = 4, 2, 37, 8, 5


@pytest.fixture
def recorded() -> Recorded:
    torch.manual_seed(0)
    return Recorded(
        inputs=torch.randn(TOKENS, 16),
        query=3 * torch.randn(HEADS, TOKENS, SIZE),
        key=torch.randn(GROUPS, TOKENS, SIZE),
        value=torch.randn(GROUPS, TOKENS, SIZE),
        scaling=SIZE**-0.5,
    )


def dense_weights(recorded: Recorded) -> torch.Tensor:
    """[G, heads of the group, N, N] attention probabilities."""
    key = recorded.key.repeat_interleave(HEADS // GROUPS, 0)
    logits = recorded.query @ key.transpose(1, 2) * recorded.scaling
    later = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    return logits.masked_fill(later, -torch.inf).softmax(-1).view(GROUPS, -1, TOKENS, TOKENS)


def largest(probabilities: torch.Tensor) -> torch.Tensor:
    return probabilities.amax((0, 1))


def mean(probabilities: torch.Tensor) -> torch.Tensor:
    return probabilities.mean((0, 1))


def p99(probabilities: torch.Tensor) -> torch.Tensor:
    """Of fewer than 100 queries the largest, of 100 to 199 the second."""
    best = probabilities.amax(0)
    return best.sort(dim=0, descending=True).values[len(best) // 100]


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("reduce", [largest, mean, p99])
def test_targets_equal_the_definition(recorded, step, reduce, monkeypatch):
    from sparsek_cli.conversion.calibrate import targets

    monkeypatch.setattr(targets, "_BLOCK", 7)
    rows = torch.arange(0, TOKENS, step)
    answer = torch.zeros(TOKENS, dtype=torch.bool)
    answer[[21, 30, 36]] = True
    target = {largest: "max", mean: "mean", p99: "p99"}[reduce]
    best, best_answer = future_attention(recorded, rows, answer, WINDOW, target)
    weights = dense_weights(recorded)
    for result, chosen in ((best, rows), (best_answer, rows[answer[rows]])):
        expected = torch.full((GROUPS, TOKENS), FLOOR)
        for key in range(TOKENS):
            later = chosen[chosen >= key + WINDOW]
            for group in range(GROUPS if len(later) else 0):
                expected[group, key] = reduce(weights[group, :, later, key]).log()
        assert torch.allclose(result, expected.clamp_min(FLOOR), atol=1e-5)


def test_a_percentile_leaves_the_largest_out():
    from sparsek_cli.conversion.calibrate.targets import REDUCTIONS

    logits = torch.rand(2, 3, 350, 4).log()
    reduction = REDUCTIONS["p99"](2, 4, logits.device)
    for part in logits.split(100, dim=2):
        reduction.add(part)
    expected = logits.amax(1).sort(dim=1, descending=True).values[:, 3]
    assert torch.equal(reduction.result(), expected)


def visible(effective, rows, slots, topk) -> torch.Tensor:
    ranks = prefix_ranks(effective, rows, slots)
    return (ranks <= topk) | always_visible(TOKENS, rows, slots)


@pytest.mark.parametrize("sinks", [0, 3])
def test_visible_keys_equal_the_definition(sinks):
    # Few distinct values: ties go to the earlier token.
    effective = torch.randint(0, 4, (3, TOKENS)).double()
    topk, slots = 6, Slots(WINDOW, sinks, (6,))
    rows = torch.tensor([0, 4, 9, 20, TOKENS - 1])
    seen = visible(effective, rows, slots, topk)
    for line in range(3):
        for number, t in enumerate(rows.tolist()):
            candidates = range(sinks, t - WINDOW + 1)
            best = sorted(candidates, key=lambda j: (-float(effective[line, j]), j))[:topk]
            expected = {j for j in range(t + 1) if j < sinks or j > t - WINDOW} | set(best)
            assert set(seen[line, number].nonzero().flatten().tolist()) == expected


def test_output_error_equals_attention_over_the_kept_keys(recorded):
    slots = Slots(WINDOW, sinks=1, sizes=(2, 4, TOKENS))
    effective = torch.randn(2, GROUPS, TOKENS).double()
    out_weight = torch.randn(HEADS * SIZE, 16)
    rows = torch.tensor([15, 30])
    errors = output_errors(recorded, effective, rows, slots, out_weight)
    weights = dense_weights(recorded)
    value = recorded.value[:, None]
    for candidate, level in ((0, 0), (0, 1), (1, 1), (1, 2)):
        seen = visible(effective[candidate], torch.arange(TOKENS), slots, slots.sizes[level])
        sparse = weights * seen[:, None]
        sparse = sparse / sparse.sum(-1, keepdim=True)
        for group in range(GROUPS):
            part = out_weight.view(GROUPS, -1, 16)[group]

            def project(w, group=group, part=part):
                joined = (w[group] @ value[group]).transpose(0, 1).reshape(TOKENS, -1)
                return joined @ part

            difference = (project(sparse) - project(weights)).square().sum(-1)[rows]
            assert torch.allclose(errors[candidate, level, group], difference, atol=1e-4)
    assert float(errors[:, 2].max()) < 1e-8


def test_slots_go_where_the_error_falls():
    sizes = (1, 2, 4, 8)
    flat = np.zeros(4)
    steep = np.array([8.0, 4.0, 2.0, 1.0])
    chosen = allot(np.stack([flat, steep, flat, flat]), sizes, 16)
    assert [sizes[c] for c in chosen][1] == 8
    assert sum(sizes[c] for c in chosen) <= 16
    rng = np.random.default_rng(0)
    for total in (5, 9, 17, 40):
        errors = np.sort(rng.random((5, 4)), axis=1)[:, ::-1]
        chosen = allot(errors, sizes, total)
        assert sum(sizes[c] for c in chosen) <= total
    assert allot(errors[:, :1], (7,), 35).tolist() == [0] * 5


def test_ridge_finds_a_planted_map_and_normalises_it():
    inputs = torch.randn(4000, 6) * torch.tensor([1, 5, 0.1, 1, 1, 2]) + 3.0
    weight = torch.randn(2, 6)
    targets = inputs @ weight.T - 7.0
    moments = Moments(6, 2, inputs.device)
    for part in (slice(0, 1000), slice(1000, 4000)):
        moments.add(inputs[part], targets[part])
    found = ridge(moments)
    assert torch.allclose(found.scores(inputs).T, targets, atol=0.1)
    scores = found.normalised(moments).scores(inputs)
    assert torch.allclose(scores.mean(1), torch.zeros(2), atol=1e-3)
    assert torch.allclose(scores.std(1), torch.full((2,), SPREAD), atol=1e-2)
    # Only scale and offset change: the order of the keys stays, but for what rounding makes equal.
    for before, after in zip(found.scores(inputs), scores, strict=True):
        assert (after[before.argsort()].diff() > -1e-5).all()


def test_sequences_mark_what_stands_far_back(tokenizer):
    sizes = {"fitting": 6, "fit_length": 2048, "held_out": 2, "length": 2048, "documents": "mixed"}
    fitting, held_out = calibration_sequences(tokenizer, "auto", **sizes, seed=3)
    again, _ = calibration_sequences(tokenizer, "auto", **sizes, seed=3)
    assert all(np.array_equal(a.ids, b.ids) for a, b in zip(fitting, again, strict=True))
    assert [s.is_recall for s in fitting] == [False, True] * 3
    assert all(s.is_recall for s in held_out)
    sequences = fitting + held_out
    for sequence in sequences:
        assert len(sequence.ids) == len(sequence.answer) == 2048
    from sparsek_cli.data.phrasings import phrasings

    for sequence in filter(lambda s: s.is_recall, sequences):
        text = tokenizer.decode(sequence.ids)
        for row in phrasings("held_out", "unseen"):
            assert row.question.split("{key}")[0].strip() + " " not in text or row.name == "hidden"
        # The byte-level tokenizer has one id per letter: a marked row predicts a letter of a
        # value or of a repeated passage.
        ends = np.flatnonzero(sequence.answer[:-1] & ~sequence.answer[1:])
        starts = np.flatnonzero(~sequence.answer[:-1] & sequence.answer[1:])
        for start, end in zip(starts[:2], ends[:2], strict=True):
            answer = tokenizer.decode(sequence.ids[start + 2 : end + 2])
            assert answer in tokenizer.decode(sequence.ids[: start + 1])


@pytest.mark.parametrize(
    "documents", ["questions", "statements", "told_and_asked", "passages", "none"]
)
def test_documents_ask_for_one_thing_only(tokenizer, documents):
    sizes = {"fitting": 4, "fit_length": 1024, "held_out": 3, "length": 1024}
    _, held_out = calibration_sequences(tokenizer, "auto", **sizes, documents=documents, seed=3)
    for sequence in held_out:
        text, answer = tokenizer.decode(sequence.ids), sequence.answer
        assert ("assistant:" in text) == (documents in ("questions", "told_and_asked"))
        assert answer.any() == (documents != "none") and not (answer & sequence.asking).any()
        if documents in ("statements", "told_and_asked"):
            # Every marked word stands in the document, and the row before it is not marked.
            first = int(sequence.asking.argmax())
            before, places = tokenizer.decode(sequence.ids[:first]), np.flatnonzero(answer[:-1])
            for part in np.split(places, np.flatnonzero(np.diff(places) > 1) + 1):
                assert tokenizer.decode(sequence.ids[part + 1]).strip() in before
            assert len(places) > 10
        if documents == "passages":
            # What is predicted at a marked row stands in the text before, with what precedes it.
            first = int(sequence.asking.argmax())
            before = tokenizer.decode(sequence.ids[:first])
            for row in np.flatnonzero(answer)[::17]:
                assert tokenizer.decode(sequence.ids[row - 6 : row + 2]) in before


def test_text_is_taken_from_many_documents(tmp_path):
    from sparsek_cli.conversion.calibrate.texts import calibration_texts

    for number in range(5):
        (tmp_path / f"{number}.txt").write_text(str(number) * 100)

    def shares(characters: int, most: int) -> list[int]:
        read = "".join(calibration_texts(str(tmp_path), characters, most))
        return [read.count(str(number)) for number in range(5)]

    assert shares(150, 50) == [50, 50, 50, 0, 0]
    # All there is, before any document is left out.
    assert shares(500, 50) == [100] * 5
    assert shares(300, 50) == [100, 50, 50, 50, 50]


def test_models_without_a_chat_template_get_plain_questions(tokenizer):
    tokenizer.chat_template = None
    sizes = {"fitting": 1, "fit_length": 1024, "held_out": 1, "length": 1024}
    _, [sequence] = calibration_sequences(tokenizer, "auto", **sizes, documents="questions", seed=0)
    text = tokenizer.decode(sequence.ids)
    assert "\nAnswer: It is" in text.replace("Answer:It", "Answer: It") and sequence.is_recall


def calibrated(base: Path, out: Path, **settings):
    from sparsek_cli.conversion.convert import convert

    recipe = ConvertRecipe(model=str(base), out=str(out), device="cpu", **settings)
    return convert(make_plan(recipe, resolve(str(base))), Console(quiet=True))


def test_every_family_calibrates(family, dense_checkpoint, tmp_path):
    from safetensors.numpy import load_file

    base = dense_checkpoint(family)
    options = {"topk": 24, "window": 16, "calibrate_tokens": 4096, "calibrate_length": 512}
    reports = [calibrated(base, tmp_path / name, **options).calibration for name in ("a", "b")]
    one, two = (load_file(tmp_path / name / "sparsek.safetensors") for name in ("a", "b"))
    assert one.keys() == two.keys() and all(np.array_equal(one[k], two[k]) for k in one)
    assert reports[0]["text_loss"] == reports[1]["text_loss"] > 0
    assert all(np.isfinite(array).all() for array in one.values())
    weights = [array for name, array in one.items() if name.endswith("weight")]
    assert all(array.any() for array in weights)


@pytest.mark.parametrize(
    "method",
    [
        {"target": "mean", "maps": ["all"], "slopes": [0.3], "sizes": [0.5]},
        {"target": "p99", "documents": "passages", "answer_weight": 1.0},
        {"documents": "none"},
    ],
)
def test_methods_that_can_be_chosen(dense_checkpoint, tmp_path, method):
    options = {"topk": 24, "window": 16, "calibrate_tokens": 2048, "calibrate_length": 256}
    report = calibrated(dense_checkpoint("llama"), tmp_path / "a", **options, method=method)
    layers = report.calibration["layers"]
    chosen = {name for layer in layers for name in layer["map"]}
    assert chosen <= set(method.get("maps", ["text"] if method == {"documents": "none"} else
                                    ["text", "all", "answers", "blend"]))  # fmt: skip
    if "slopes" in method:
        assert {slope for layer in layers for slope in layer["slope"]} <= {0.3, 30.0}
        assert {size for layer in layers for size in layer["topk"]} <= {12, 24}
    assert sum(size for layer in layers for size in layer["topk"]) <= 24 * sum(
        len(layer["topk"]) for layer in layers
    )


def test_the_report_says_what_the_converted_model_loses(dense_checkpoint, tmp_path):
    """Its text and answer losses are those of the model on disk, on the same documents."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sparsek_cli.models import budget, dense_attention

    base, slots = dense_checkpoint("gpt2"), {"topk": 24, "window": 16}
    report = calibrated(
        base, tmp_path / "out", **slots, calibrate_tokens=2048, calibrate_length=512
    ).calibration
    _, documents = calibration_sequences(
        AutoTokenizer.from_pretrained(base), "auto", fitting=8, fit_length=512, held_out=4,
        length=512, documents="statements", seed=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    ids = torch.from_numpy(np.stack([document.ids for document in documents]))
    answer = torch.from_numpy(np.stack([document.answer for document in documents]))
    asking = torch.from_numpy(np.stack([document.asking for document in documents]))
    text = ~(answer | asking) & (torch.arange(512) >= 44)
    with torch.inference_mode():
        with dense_attention(model):
            dense = model(ids, use_cache=False).logits.log_softmax(-1)

        def losses() -> list[float]:
            sparse = model(ids, use_cache=False).logits.log_softmax(-1)
            divergence = (dense.exp() * (dense - sparse)).sum(-1)
            return [float(divergence[rows].mean()) for rows in (text, answer)]

        own = [report["text_loss"], report["answer_loss"]]
        assert losses() == pytest.approx(own, rel=1e-3, abs=1e-8)
        with budget(model, topk=0, window=40):
            window = [report["window_text_loss"], report["window_answer_loss"]]
            assert losses() == pytest.approx(window, rel=1e-3, abs=1e-8)


def test_neighbouring_layers_of_a_deep_model_are_valued_together(
    dense_checkpoint, tmp_path, monkeypatch
):
    from sparsek_cli.conversion.calibrate import run

    options = {"topk": 8, "window": 8, "calibrate_tokens": 2048, "calibrate_length": 256}
    base = dense_checkpoint("qwen2")
    for parts, together in ((12, False), (1, True)):
        monkeypatch.setattr(run, "_PARTS", parts)
        report = calibrated(base, tmp_path / str(parts), **options).calibration
        worths = [layer["worth"] for layer in report["layers"]]
        assert len(worths) > 1 and all(min(worth) > 0 for worth in worths)
        assert (worths[0] == worths[-1]) == together


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
    plan = make_plan(recipe, resolve(recipe.model))
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


@pytest.mark.skipif(not STORIES.is_dir(), reason="the stories260k checkpoint is not here")
def test_calibrated_scores_beat_random_and_window(tmp_path):
    from transformers import AutoModelForCausalLM

    from sparsek_cli.models import budget, dense_attention, random_scores

    out = tmp_path / "out"
    calibrated(STORIES, out, topk=28, window=16, calibrate_tokens=16384)
    model = AutoModelForCausalLM.from_pretrained(out)
    with torch.inference_mode():
        with dense_attention(model):
            start = torch.full((4, 1), 1)
            stories = model.generate(start, max_new_tokens=400, do_sample=True, pad_token_id=2)
            dense = model(stories, use_cache=False).logits.log_softmax(-1)

        def divergence() -> float:
            sparse = model(stories, use_cache=False).logits.log_softmax(-1)
            return float((dense.exp() * (dense - sparse)).sum(-1)[:, 64:].mean())

        ours = divergence()
        with random_scores(model):
            random = divergence()
        with budget(model, topk=0, window=16 + 28):
            window = divergence()
    assert ours < 0.7 * random
    assert ours < window
