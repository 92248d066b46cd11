"""Recipes of evaluate: the shipped ones, settled keys, words."""

import pytest

from sparsek_cli.errors import UsageError


@pytest.mark.parametrize("name", ["tiny", "demo", "ruler"])
def test_recipe_file_names_every_key(name):
    from sparsek_cli.recipes.load import load_recipe
    from sparsek_cli.recipes.schema_evaluate import EvaluateRecipe
    from sparsek_cli.recipes.shipped import recipe_folder
    from sparsek_cli.recipes.yaml_lines import read_yaml

    tree, _ = read_yaml(recipe_folder() / f"{name}.evaluate.yaml")
    assert set(tree) == set(EvaluateRecipe.model_fields)
    loaded = load_recipe(EvaluateRecipe, name, ["limit=3"], {"tasks": "ppl"}, verb="evaluate")
    lengths = [8192] if name == "demo" else [4096, 8192]
    assert (loaded.limit, loaded.tasks, loaded.lengths[:2]) == (3, ["ppl"], lengths)


def test_a_settled_key_is_refused_where_it_asks_for_something_else():
    from sparsek_cli.recipes.load import load_recipe
    from sparsek_cli.recipes.schema_evaluate import EvaluateRecipe

    assert load_recipe(EvaluateRecipe, None, ["share_prefix=true"], {})
    with pytest.raises(UsageError, match="unknown key 'share_prefix'") as refused:
        load_recipe(EvaluateRecipe, None, ["share_prefix=false"], {})
    assert refused.value.hint.startswith("leave it out")


@pytest.mark.parametrize("value", ["on", "off", "auto"])
def test_chat_template_as_a_word(value):
    from sparsek_cli.recipes.load import load_recipe
    from sparsek_cli.recipes.schema_evaluate import EvaluateRecipe

    made = load_recipe(EvaluateRecipe, None, [f"chat_template={value}"], {}, verb="evaluate")
    assert made.chat_template == value
