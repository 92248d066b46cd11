"""The shipped conversion recipes are valid and comment every key."""

from __future__ import annotations

import pytest

from sparsek_cli.errors import UsageError
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
    [("1/16", "auto", "told_and_asked"), ("1/2", "auto", "retold"), ("1/16", "retold", "retold")],
)
def test_few_heads_learn_from_facts(tmp_path, budget, wanted, documents):
    """A sixteenth of tiny's slots holds one head's whole document: it cannot tell one again."""
    from sparsek_cli.conversion.calibrate.method import Method
    from sparsek_cli.conversion.plan import plan

    settings = {"model": "tiny", "out": str(tmp_path / "out"), "budget": budget}
    made = plan(ConvertRecipe(**settings), Method(documents=wanted))
    assert made.calibration.method.documents == documents
    assert ("again and asked for" in made.text()) == (documents == "told_and_asked")


@pytest.mark.parametrize(
    ("block", "key", "line", "hint"),
    [
        ("  slopes: [0]\n  recall: 0.8", "method.slopes", 3, "leave it out"),
        ("  recall: 0.8", "method.recall", 3, "write recall=... in its place"),
        ("  answer_weight: 1", "method.answer_weight", 3, "leave it out"),
        ("  unheard: 1", "method", 2, "leave it out"),
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
