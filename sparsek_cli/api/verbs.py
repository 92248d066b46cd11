"""convert, finetune and evaluate: a recipe and settings on top, planned and run."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from sparsek_cli.api.values import (
    Place,
    check_reporter,
    check_switches,
    place_or_none,
    places,
    plain,
)
from sparsek_cli.recipes.load import Draft
from sparsek_cli.reporter import Reporter

if TYPE_CHECKING:
    from pydantic import BaseModel

    from sparsek_cli.conversion.run import Converted
    from sparsek_cli.evaluation.run import Evaluated
    from sparsek_cli.training.run import Trained

    Recipe = TypeVar("Recipe", bound=BaseModel)


def convert(
    model: Place,
    out: Place | None = None,
    *,
    recipe: str | None = None,
    reporter: Reporter | None = None,
    **settings: Any,
) -> "Converted":
    """Gives a model SparseK attention, as `sparsek convert` does.

    Args:
        model: folder, short name or hub id of the base.
        out: the folder to write; default: `<name>-sparsek`.
        recipe: a recipe's name or file, below the settings.
        reporter: where progress goes; default: nowhere.
        settings: keys of a conversion recipe: budget, topk, window, calibrate, overwrite, ...

    Returns:
        `out`, the plan, what was written and verified, and what calibration found.
    """
    from sparsek_cli.conversion.plan import plan
    from sparsek_cli.conversion.run import run
    from sparsek_cli.recipes.schema_convert import ConvertRecipe

    draft = _draft(recipe, "convert", reporter)
    return run(plan(_validated(ConvertRecipe, draft, model, out, settings)), reporter)


def finetune(
    model: Place | None = None,
    out: Place | None = None,
    *,
    data: Place | Iterable[Place] | None = None,
    recipe: str | None = None,
    resume: bool = False,
    reporter: Reporter | None = None,
    **settings: Any,
) -> "Trained":
    """Trains a model's scorers, adapters or all of it, as `sparsek finetune` does.

    Args:
        model: what to start from; None with a recipe that says init: random.
        out: the folder to write; default: `<name>-finetuned`.
        data: text to train on: one or several files, folders and globs, or one hub id, in place of
            the recipe's; or a mapping: the recipe's own key.
        recipe: a recipe's name or file, below the settings.
        resume: go on with an unfinished run of the same settings.
        reporter: where progress goes; default: nowhere.
        settings: keys of a fine-tuning recipe: train, steps, learning_rate, overwrite, ...

    Returns:
        `out`, losses before and after, speed and memory.
    """
    from sparsek_cli.recipes.data import set_text
    from sparsek_cli.recipes.schema_finetune import FinetuneRecipe
    from sparsek_cli.training.plan import plan
    from sparsek_cli.training.run import run

    draft = _draft(recipe, "finetune", reporter, resume=resume)
    if isinstance(data, Mapping):
        settings["data"] = data
    elif data is not None:
        set_text(draft, places("data", data), "data")
    made = _validated(FinetuneRecipe, draft, model, out, settings)
    return run(plan(made, reporter, resume=resume), reporter)


def evaluate(
    model: Place,
    out: Place | None = None,
    *,
    recipe: str | None = None,
    resume: bool = False,
    reporter: Reporter | None = None,
    **settings: Any,
) -> "Evaluated":
    """Measures a model against its dense self and others at equal bytes, as `sparsek evaluate`.

    Args:
        model: folder, short name or hub id; converted or dense.
        out: the result folder; default: `runs/evaluate/<model>/<settings>`.
        recipe: a recipe's name or file, below the settings.
        resume: keep what an interrupted run of the same settings finished.
        reporter: where progress goes; default: nowhere.
        settings: keys of an evaluation recipe: tasks, baselines, lengths, limit, overwrite, ...

    Returns:
        `score(task, policy)`, the whole `report`, and `text()`: the table.
    """
    from sparsek_cli.evaluation.plan import plan
    from sparsek_cli.evaluation.run import run
    from sparsek_cli.recipes.schema_evaluate import EvaluateRecipe

    draft = _draft(recipe, "evaluate", reporter, resume=resume)
    made = _validated(EvaluateRecipe, draft, model, out, settings)
    return run(plan(made, resume=resume), reporter)


def _validated(
    kind: "type[Recipe]",
    draft: Draft,
    model: Place | None,
    out: Place | None,
    settings: Mapping[str, Any],
) -> "Recipe":
    """The recipe with what the caller gave on top."""
    places = {"model": place_or_none("model", model), "out": place_or_none("out", out)}
    given = {key: value for key, value in places.items() if value is not None}
    for key, value in {**settings, **given}.items():
        draft.set(key, plain(value), f"{key}=")
    return draft.validated(kind)


def _draft(recipe: object, verb: str, reporter: object, **switches: object) -> Draft:
    """The recipe that a caller names, and nothing else; raises UsageError for arguments."""
    check_reporter(reporter)
    check_switches(**switches)
    return Draft(place_or_none("recipe", recipe), verb=verb)
