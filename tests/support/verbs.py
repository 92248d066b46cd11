"""Each verb in one call: planned, then run."""

from dataclasses import replace
from typing import Any

from sparsek_cli.reporter import Reporter


def convert(recipe: Any, reporter: Reporter | None = None, *, method: Any = None) -> Any:
    """The result of a ConvertRecipe; `method`: how scorers are found, if not as settled."""
    from sparsek_cli.conversion.plan import plan
    from sparsek_cli.conversion.run import run

    return run(plan(recipe, method), reporter)


def finetune(recipe: Any, reporter: Reporter | None = None, *, resume: bool = False) -> Any:
    """The result of a FinetuneRecipe."""
    from sparsek_cli.training.plan import plan
    from sparsek_cli.training.run import run

    return run(plan(recipe, reporter, resume=resume), reporter)


def evaluate(
    recipe: Any,
    reporter: Reporter | None = None,
    *,
    resume: bool = False,
    overwrite: bool | None = None,
    share_prefix: bool = True,
) -> dict[str, Any]:
    """The report of an EvaluateRecipe."""
    from sparsek_cli.evaluation.plan import plan
    from sparsek_cli.evaluation.run import run

    if overwrite is not None:
        recipe = recipe.model_copy(update={"overwrite": overwrite})
    made = plan(recipe, resume=resume)
    made = replace(made, prompts=replace(made.prompts, share_prefix=share_prefix))
    return run(made, reporter).report
