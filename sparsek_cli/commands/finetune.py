"""`sparsek finetune`: train scorers, adapters or everything, from a recipe."""

from shlex import quote
from typing import Annotated

import typer

from sparsek_cli.commands import options
from sparsek_cli.console import Console


def finetune(
    words: options.Words = None,
    recipe: options.Recipe = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="FILE",
            help="Text to train on: files, a folder, or a hub dataset; replaces the recipe's.",
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", metavar="N", help="Steps.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted run from its checkpoint.")
    ] = False,
    seed: options.Seed = None,
    device: options.Device = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", metavar="TYPE", help="auto, bfloat16 or float32 [auto]."),
    ] = None,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Train MODEL and write OUT: its scorers, adapters, or all of it; or a model from scratch.

    Several GPUs: `torchrun --nproc-per-node 8 -m sparsek_cli finetune ...` or `accelerate launch
    -m sparsek_cli finetune ...`; the recipe stays the same.
    """
    from sparsek_cli.devices import is_first

    first = is_first()
    console = Console(as_json=as_json, quiet=quiet or not first, verbose=verbose)
    flags = {
        "steps": steps,
        "seed": seed,
        "device": device,
        "dtype": dtype,
        "overwrite": overwrite or None,
    }
    settings = _recipe(words, recipe, data, flags)
    if not verbose:
        from sparsek_cli.silence import no_bars

        no_bars()
    if settings.model:
        console.say(f"loading {settings.model}")  # seconds, most of them imports
    from sparsek_cli import hub
    from sparsek_cli.commands import last_model
    from sparsek_cli.converted import is_converted
    from sparsek_cli.training.plan import plan as make_plan
    from sparsek_cli.training.run import run

    plan = make_plan(settings, console, resume=resume)
    if dry_run:
        if first:
            options.shown_dry(console, plan, dry_run)
        return
    done = run(plan, console)
    if not first:
        return
    console.result(done.text(), done.data())
    if settings.train == "lora" and not settings.lora.merge:
        console.say(f"\nnext: PeftModel.from_pretrained(model, {str(done.out)!r})")
        return
    last_model.remember(done.out)
    out = quote(str(done.out))
    console.say(f"\nnext: sparsek evaluate {out} --tasks ppl,recall --limit 4")
    if (
        settings.train != "scorers"
        and settings.scorer_training in ("gates", "frozen")  # others keep up with the base
        and settings.init == "pretrained"
        and is_converted(hub.resolve(done.out).config())
    ):
        console.say(
            f"      sparsek convert {out} {quote(str(done.out) + '-again')} --again"
            "  # scorers fitted to the weights it has now"
        )


def _recipe(words, recipe, data, flags):
    """The validated recipe with model and output filled in."""
    from sparsek_cli.recipes.data import set_text
    from sparsek_cli.recipes.load import Draft
    from sparsek_cli.recipes.schema_finetune import FinetuneRecipe

    (first, second), overrides = options.split_words(words, "MODEL", "OUT")
    draft = Draft(recipe, verb="finetune").words(overrides)
    if data:
        set_text(draft, data, "--data")
    scratch = draft.get("init") == "random" and second is None
    places = {"model": None, "out": first} if scratch else {"model": first, "out": second}
    return draft.flags({**flags, **places}).validated(FinetuneRecipe)
