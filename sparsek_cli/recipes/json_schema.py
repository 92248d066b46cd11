"""JSON schemas of recipes, by which editors complete keys and mark mistakes."""

from importlib import import_module
from typing import Any

from sparsek_cli.errors import UsageError

_CLASSES = {
    "convert": "ConvertRecipe",
    "finetune": "FinetuneRecipe",
    "evaluate": "EvaluateRecipe",
}


def recipe_schema(verb: str) -> dict[str, Any]:
    """The schema (draft 2020-12) of what a recipe of `verb` may hold, descriptions included.

    Raises:
        UsageError: a verb without recipes.
    """
    if verb not in _CLASSES:
        raise UsageError(
            f"'{verb}' has no recipes", hint=f"the verbs that have are {', '.join(_CLASSES)}"
        )
    module = import_module(f"sparsek_cli.recipes.schema_{verb}")
    found = getattr(module, _CLASSES[verb]).model_json_schema(by_alias=True)
    extends = {"type": "string", "description": "a recipe that this one starts from"}
    found["properties"] = {"extends": extends, **found["properties"]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found}
