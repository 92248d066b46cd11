"""What a request for a conversion leaves open: OUT, and what a converted base has already."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from sparsek_cli.errors import UsageError
from sparsek_cli.hub import Checkpoint
from sparsek_cli.output.contents import MODEL, SCORERS_ALONE, Contents
from sparsek_cli.output.place import absolute
from sparsek_cli.recipes.schema_convert import ConvertRecipe


def out_folder(recipe: ConvertRecipe, base: Checkpoint) -> Path:
    """The folder to write: the request's, else named after the base."""
    return absolute(recipe.out or f"{base.name}-{'scorers' if recipe.scorers_only else 'sparsek'}")


def contents_of(scorers_only: bool) -> Contents:
    """What will lie in OUT."""
    return SCORERS_ALONE if scorers_only else MODEL


def check_scorers_only(recipe: ConvertRecipe, *, packed: bool) -> None:
    """Raises UsageError where the scorers alone cannot be asked for."""
    if packed:
        raise UsageError(
            "scorers_only: a GGUF file is no base that scorers can be put onto later",
            hint="convert it whole; `sparsek export OUT DENSE` then gives the base for its scorers",
        )
    if recipe.copy_base:
        raise UsageError(
            "scorers_only and copy are both given", hint="scorers alone hold nothing of the base"
        )


def with_settings_of(recipe: ConvertRecipe, block: dict[str, Any]) -> ConvertRecipe:
    """The request with the slots and the gate that the model has, where it names none."""
    given = recipe.model_fields_set
    settings = {key: block[key] for key in ("window", "sinks", "gate") if key not in given}
    if not given & {"topk", "budget"}:
        topk = block["topk"]
        layers = [x for x in topk if x is not None] if isinstance(topk, list) else [topk]
        settings["topk"] = math.ceil(np.mean([np.mean(layer) for layer in layers]))
    if "scorer" not in recipe.method.model_fields_set and block["scorer"]["type"] == "mlp":
        settings["method"] = recipe.method.model_copy(
            update={"scorer": "mlp", "width": block["scorer"]["width"]}
        )
    return recipe.model_copy(update=settings)
