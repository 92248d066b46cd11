"""`sparsek finetune`: train scorers, adapters or everything, from a recipe."""

import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from sparsek_cli.commands import options
from sparsek_cli.console import Console
from sparsek_cli.errors import UsageError


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
    first = os.environ.get("RANK", "0") == "0"
    console = Console(as_json=as_json, quiet=quiet or not first, verbose=verbose)
    settings = _recipe(words, recipe, data, {"steps": steps, "seed": seed, "device": device})
    if not verbose:
        _hush()
    from sparsek_cli.training.run import TrainingPlan
    from sparsek_cli.training.run import finetune as run

    with _report(console) as report:
        result = run(settings, dry_run=dry_run, resume=resume, overwrite=overwrite, report=report)
    if not first:
        return
    if isinstance(result, TrainingPlan):
        console.result(result.text(), result.as_dict())
        return
    lines = [f"wrote {result.output}"]
    if result.held_out_loss is not None:
        before = "" if result.start_loss is None else f" (before: {result.start_loss:.4f})"
        lines.append(f"held-out loss {result.held_out_loss:.4f}{before}")
    if result.answer_loss is not None:
        lines.append(f"held-out loss of answers {result.answer_loss:.4f}")
    if result.held_out_recall is not None:
        before = "" if result.start_recall is None else f" (before: {result.start_recall:.1%})"
        lines.append(f"held-out recall {result.held_out_recall:.1%}{before}")
    if result.kept == "start":
        lines.append("training did not help: the scorers it started with were kept")
    lines += [
        f"loss {result.loss:.4f} after {result.steps} steps, "
        f"{result.tokens_per_second:,.0f} tokens/s",
        f"next: sparsek evaluate {result.output} --tasks ppl,recall",
    ]
    if settings.train != "scorers" and settings.init == "pretrained" and _is_sparse(result.output):
        lines.append(
            f"      sparsek convert {result.output} {result.output}-again --again"
            "  # scorers fitted to the weights it has now"
        )
    console.result("\n".join(lines), vars(result))


def _is_sparse(folder: str) -> bool:
    return "sparsek" in json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))


def _recipe(words, recipe, data, flags):
    """The validated recipe with model and output filled in."""
    from sparsek_cli.recipes.load import load_recipe
    from sparsek_cli.recipes.schema_finetune import FinetuneRecipe

    (first, second), overrides = options.split_words(words, "MODEL", "OUT")
    if data:
        overrides = [*overrides, *_data_words(recipe, data, overrides)]
    draft = load_recipe(FinetuneRecipe, recipe, overrides, flags, verb="finetune")
    if draft.init == "random" and second is None:
        model, output = draft.model, first
    else:
        model, output = first, second
    places = {"model": model, "out": output}
    settings = load_recipe(FinetuneRecipe, recipe, overrides, {**flags, **places}, verb="finetune")
    if settings.init == "pretrained" and settings.model is None:
        raise UsageError("MODEL is missing", hint="name a folder, short name or hub id")
    if settings.out is None:
        name = os.path.basename(os.path.normpath(settings.model or settings.architecture.type))
        settings = settings.model_copy(update={"out": f"{name}-finetuned"})
    return settings


def _data_words(recipe, data, overrides):
    """`--data` as words: the place of every text source, or one source where there is none."""
    import json

    from sparsek_cli.data.text import is_hub_id
    from sparsek_cli.recipes.load import load_recipe
    from sparsek_cli.recipes.schema_finetune import FinetuneRecipe

    draft = load_recipe(FinetuneRecipe, recipe, overrides, verb="finetune")
    named = [name for name, block in draft.data.items() if block.kind == "text"]
    place = {"files": data, "dataset": None}
    if len(data) == 1 and is_hub_id(data[0]):
        place = {"files": None, "dataset": data[0]}
    if not named:
        return [f"data.text={json.dumps({'kind': 'text', **place})}"]
    return [
        f"data.{name}.{key}={json.dumps(value)}" for name in named for key, value in place.items()
    ]


def _hush() -> None:
    """No bars of other libraries beside ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()


@contextmanager
def _report(console: Console):
    """Progress as a bar and lines on stderr."""
    with console.progress("training") as bar:

        class OnConsole:
            done: int | None = None

            def say(self, text: str) -> None:
                console.say(text)

            def step(self, done: int, total: int, rate: str) -> None:
                if self.done is None:
                    bar.describe("training", total=total)
                    self.done = 0
                # Without a terminal the lines of the log say the same.
                if sys.stderr.isatty():
                    bar.advance(done - self.done, rate=rate)
                self.done = done

        yield OnConsole()
