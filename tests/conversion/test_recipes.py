"""The shipped conversion recipes are valid and comment every key."""

from __future__ import annotations

import dataclasses

import pytest
import yaml

from sparsek_cli.conversion.plan import plan
from sparsek_cli.errors import UsageError
from sparsek_cli.recipes.earlier_versions import SETTLED_CONVERT
from sparsek_cli.recipes.load import load_recipe
from sparsek_cli.recipes.schema_convert import ConvertRecipe
from sparsek_cli.recipes.shipped import recipe_folder, recipe_names

NAMES = [name for name in recipe_names() if name.endswith(".convert")]


def test_there_are_some():
    assert "tiny.convert" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_recipe_is_valid_and_every_key_commented(name):
    recipe = load_recipe(ConvertRecipe, name, verb="convert")
    assert recipe.model
    for line in (recipe_folder() / f"{name}.yaml").read_text().splitlines():
        assert not line or line.startswith("#") or " # " in line, line


@pytest.mark.parametrize(
    ("budget", "wanted", "documents"),
    [
        ("1/16", "auto", "told_and_asked"),
        ("1/2", "auto", "retold_and_asked"),
        ("1/16", "retold", "retold"),
    ],
)
def test_few_heads_learn_from_facts(tmp_path, budget, wanted, documents):
    """A sixteenth of tiny's slots holds one head's whole document: it cannot tell one again."""
    from sparsek_cli.conversion.calibrate.method import Method
    from sparsek_cli.conversion.plan import plan

    settings = {"model": "tiny", "out": str(tmp_path / "out"), "budget": budget}
    made = plan(ConvertRecipe(**settings), Method(documents=wanted))
    assert made.calibration.method.documents == documents
    assert ("again and asked for" in made.text()) == (documents != "retold")
    assert ("that are told again" in made.text()) == (documents != "told_and_asked")


# What lies beside a model that an earlier version converted, below `method` in sparsek.yaml.
METHOD_BEFORE = {
    "scorer": "mlp", "width": 128, "target": "max", "documents": "auto",
    "maps": ["text", "all", "answers", "blend"], "slopes": [0.0, 0.05, 0.2, 0.7, 2.5],
    "sizes": [0.0, 0.0625, 0.125, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0], "recall": 0.8,
}  # fmt: skip


def test_what_a_converted_model_recorded_is_replayed(tmp_path):
    file = tmp_path / "sparsek.yaml"
    file.write_text(yaml.safe_dump({"model": "tiny", "topk": 188, "method": METHOD_BEFORE}))
    recipe = load_recipe(ConvertRecipe, file, verb="convert")
    assert (recipe.topk, recipe.recall) == (188, 0.8)
    again = {"model": "tiny", "recall": 0.8, "method": METHOD_BEFORE}
    assert ConvertRecipe(**again).recall == 0.8


def test_what_is_accepted_of_a_method_is_what_is_done():
    """An accepted value of another method would make another model, in silence."""
    from sparsek_cli.conversion.calibrate.method import Method

    done = dataclasses.asdict(Method())
    assert METHOD_BEFORE.keys() - {"recall"} == done.keys()
    for key, value in done.items():
        allowed, _ = SETTLED_CONVERT[f"method.{key}"]
        assert value in allowed
        assert all(value == type(value)(other) for other in allowed), key


@pytest.mark.parametrize(
    ("block", "key", "line", "hint"),
    [
        ("  slopes: [0]\n  recall: 0.8", "method.slopes", 3, "leave the block method out"),
        ("  width: 128\n  scorer: linear", "method.scorer", 4, "leave the block method out"),
        ("  documents: statements", "method.documents", 3, "leave the block method out"),
        ("  recall: 1.5", "method.recall", 3, "write recall=... in its place"),
        ("  recall: 0.8\nrecall: 0.7", "method.recall", 3, "write recall=... in its place"),
        ("  answer_weight: 0.1", "method.answer_weight", 3, "leave the block method out"),
        ("  unheard: 1", "method", 2, "leave the block method out"),
    ],
)
def test_keys_that_ablations_settled_are_refused_with_what_to_do(tmp_path, block, key, line, hint):
    file = tmp_path / "old.convert.yaml"
    file.write_text(f"model: tiny\nmethod:\n{block}\n")
    with pytest.raises(UsageError) as refused:
        load_recipe(ConvertRecipe, file, verb="convert")
    assert refused.value.message == f"{file}:{line}: unknown key '{key}'"
    assert hint in refused.value.hint


def test_settled_words_are_refused_too():
    with pytest.raises(UsageError, match="'method.scorer=linear': unknown key 'method.scorer'"):
        load_recipe(ConvertRecipe, None, ["method.scorer=linear"], {"model": "tiny"})


def test_how_to_calibrate_gives_way_where_nothing_is_calibrated(dense_checkpoint, tmp_path):
    """Beside `calibrate: none` it counted for nothing, without a word."""
    base = {"model": str(dense_checkpoint()), "out": str(tmp_path / "out")}
    (tmp_path / "r.yaml").write_text("calibrate_tokens: 512\ncalibrate_length: 64\ntopk: 16\n")
    made = load_recipe(ConvertRecipe, tmp_path / "r.yaml", (), {**base, "calibrate": "none"})
    assert (made.calibrate_tokens, made.calibrate_length, made.topk) == (None, None, 16)
    assert plan(made).calibrate_tokens == 0
    text = load_recipe(ConvertRecipe, tmp_path / "r.yaml", (), {**base, "calibrate": "auto"})
    assert (text.calibrate_tokens, text.calibrate_length) == (512, 64)
    beside = load_recipe(ConvertRecipe, None, ["calibrate=none", "calibrate_length=64"], base)
    with pytest.raises(UsageError, match="calibrate_length 64 would count for nothing"):
        plan(beside)
