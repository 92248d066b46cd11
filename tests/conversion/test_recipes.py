"""The shipped conversion recipes are valid and comment every key."""

from __future__ import annotations

import pytest

from sparsek_cli.recipes.load import load_recipe, recipe_folder, recipe_names
from sparsek_cli.recipes.schema_convert import ConvertRecipe

NAMES = [name for name in recipe_names() if name.endswith(".convert")]


def test_there_are_some():
    assert "tiny.convert" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_recipe_is_valid_and_every_key_commented(name):
    recipe = load_recipe(ConvertRecipe, name, verb="convert")
    assert recipe.model
    for line in (recipe_folder() / f"{name}.yaml").read_text().splitlines():
        assert not line or line.startswith("#") or " # " in line, line
