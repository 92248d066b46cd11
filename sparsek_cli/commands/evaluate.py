"""`sparsek evaluate` (alias `eval`)."""

from typing import Annotated

import typer

from sparsek_cli.commands import options
from sparsek_cli.console import Console

Value = typer.Option
Tasks = Annotated[str | None, Value("--tasks", metavar="A,B", help="Tasks and groups; see --list.")]
Baselines = Annotated[
    str | None,
    Value(
        "--baselines",
        metavar="A,B",
        help="Others: dense, window, random, snapkv, h2o, kvzip, RULE:shared, kvpress:NAME.",
    ),
]
Budgets = Annotated[
    str | None, Value("--budgets", metavar="N,N", help="Pairs per KV head to try, same checkpoint.")
]
Limit = Annotated[int | None, Value("--limit", metavar="N", help="Samples per task and length.")]
Lengths = Annotated[
    str | None, Value("--lengths", metavar="N,N", help="Prompt lengths, in tokens.")
]
Data = Annotated[
    str | None,
    Value("--data", metavar="DIR", help="Local data: DIR/<set>, DIR/text, DIR/<hub id>."),
]
Text = Annotated[
    list[str] | None,
    Value("--text", metavar="FILE", help="Text for ppl and filler for needles; repeatable."),
]
Truncate = Annotated[
    str | None,
    Value("--truncate", metavar="left|middle", help="Cut prompts that are too long [refuse]."),
]
MaxLength = Annotated[
    int | None, Value("--max-length", metavar="N", help="Most tokens of prompt and answer.")
]
BatchSize = Annotated[
    str | None, Value("--batch-size", metavar="N|auto", help="Prompts scored side by side.")
]
Out = Annotated[str | None, Value("--out", "--output", "-o", metavar="DIR", help="Result folder.")]
Resume = Annotated[
    bool, Value("--resume", help="Go on where a run with the same settings stopped.")
]
Overwrite = Annotated[bool, Value("--overwrite", help="Replace the results in DIR.")]
Compare = Annotated[
    bool, Value("--compare", help="Compare two result folders, given as A B, and stop.")
]
List = Annotated[bool, Value("--list", help="List tasks and stop.")]


def evaluate(
    words: options.ModelWords = None,
    tasks: Tasks = None,
    baselines: Baselines = None,
    budgets: Budgets = None,
    limit: Limit = None,
    lengths: Lengths = None,
    data: Data = None,
    text: Text = None,
    truncate: Truncate = None,
    max_length: MaxLength = None,
    yarn: options.Yarn = None,
    batch_size: BatchSize = None,
    out: Out = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    compare: Compare = False,
    show_list: List = False,
    recipe: options.Recipe = None,
    revision: options.Revision = None,
    seed: options.Seed = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure a model on long-context tasks against its dense self and others at equal bytes.

    Without MODEL: the last model converted or fine-tuned here, else the bundled one.
    """
    from sparsek_cli.devices import is_first

    first = is_first()
    console = Console(as_json=as_json, quiet=quiet or not first, verbose=verbose)
    if compare:
        from sparsek_cli.evaluation.report.compare import as_text as compared_text
        from sparsek_cli.evaluation.report.compare import compare as compared

        (one, other), _ = options.split_words(words, "A", "B", required=2)
        comparison = compared(one, other)
        console.result(compared_text(comparison), comparison)
        return
    (model,), overrides = options.split_words(words, "MODEL")
    if show_list:
        from sparsek_cli.evaluation.tasks.listing import listing, listing_data

        console.result(listing(), listing_data())
        return
    from sparsek_cli.recipes.load import load_recipe
    from sparsek_cli.recipes.schema_evaluate import EvaluateRecipe

    flags = {
        "model": model,
        "tasks": tasks,
        "baselines": baselines,
        "budgets": budgets,
        "limit": limit,
        "lengths": lengths,
        "data": data,
        "text": text or None,
        "truncate": truncate,
        "max_length": max_length,
        "yarn": yarn,
        "batch_size": options.number(batch_size),
        "out": out,
        "overwrite": overwrite or None,
        "revision": revision,
        "seed": seed,
        "device": device,
        "dtype": dtype,
    }
    settings = load_recipe(EvaluateRecipe, recipe, overrides, flags, verb="evaluate")
    from sparsek_cli.commands.last_model import name_or_default
    from sparsek_cli.evaluation.plan import plan as make_plan

    named = name_or_default(settings.model, say=console.say)
    plan = make_plan(settings.model_copy(update={"model": named}), resume=resume)
    if dry_run:
        if first:
            options.shown_dry(console, plan, dry_run)
        return
    console.say(f"loading {plan.checkpoint.name}")  # seconds, most of them imports
    from sparsek_cli.evaluation.run import run

    done = run(plan, console)
    if first:
        console.result(done.text(), done.data())
