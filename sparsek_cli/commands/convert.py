"""`sparsek convert`."""

from shlex import quote
from typing import Annotated

import typer

from sparsek_cli.commands import options

# Numbers are taken as text, so that "many" and 0 are refused by the recipe with the same words
# whether they come from a flag, a dotted word or a file.
_Number = str | None


Budget = Annotated[
    _Number,
    typer.Option(
        "--budget", metavar="N|1/N", help="All slots per KV head, or a share of the context."
    ),
]
Topk = Annotated[_Number, typer.Option("--topk", metavar="N", help="Selected keys per KV head.")]
Window = Annotated[
    _Number, typer.Option("--window", metavar="N", help="Newest tokens always seen.")
]
Sinks = Annotated[
    _Number, typer.Option("--sinks", metavar="N", help="First tokens always seen [4].")
]
Gate = Annotated[
    str | None,
    typer.Option("--gate", metavar="GATE", help="straight_through (default), log or kv."),
]
Calibrate = Annotated[
    str | None,
    typer.Option(
        "--calibrate", metavar="TEXT", help="auto (default), none, a file, or a hub dataset."
    ),
]
CalibrateTokens = Annotated[
    _Number, typer.Option("--calibrate-tokens", metavar="N", help="Tokens to fit on.")
]
CalibrateLength = Annotated[
    _Number, typer.Option("--calibrate-length", metavar="N", help="Tokens per document.")
]
Tokenizer = Annotated[
    str | None,
    typer.Option(
        "--tokenizer", metavar="NAME", help="Folder or hub id of a tokenizer, not the base's own."
    ),
]
Again = Annotated[
    bool, typer.Option("--again", help="MODEL is converted: calibrate it anew, as it is now.")
]
ScorersOnly = Annotated[
    bool, typer.Option("--scorers-only", help="Write the scorers alone; see `sparsek merge`.")
]
ListModels = Annotated[bool, typer.Option("--list-models", help="Show the short names and stop.")]


def convert(
    words: options.Words = None,
    budget: Budget = None,
    topk: Topk = None,
    window: Window = None,
    sinks: Sinks = None,
    gate: Gate = None,
    calibrate: Calibrate = None,
    calibrate_tokens: CalibrateTokens = None,
    calibrate_length: CalibrateLength = None,
    tokenizer: Tokenizer = None,
    again: Again = False,
    scorers_only: ScorersOnly = False,
    copy: options.Copy = False,
    overwrite: options.Overwrite = False,
    revision: options.Revision = None,
    recipe: options.Recipe = None,
    list_models: ListModels = False,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
    seed: options.Seed = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    cache_dtype: options.CacheDtype = None,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Give a model SparseK attention: MODEL (folder, GGUF file, hub id or name) becomes OUT."""
    from sparsek_cli.console import Console

    console = Console(as_json=as_json, quiet=quiet, verbose=verbose)
    if list_models:
        console.result(*_short_names())
        return
    from sparsek_cli.commands import last_model
    from sparsek_cli.conversion.plan import plan as make_plan
    from sparsek_cli.conversion.run import run
    from sparsek_cli.conversion.tokenizer import NONE
    from sparsek_cli.recipes.load import load_recipe
    from sparsek_cli.recipes.schema_convert import ConvertRecipe

    (model, out), overrides = options.split_words(words, "MODEL", "OUT")
    numbers = {
        "budget": budget,
        "topk": topk,
        "window": window,
        "sinks": sinks,
        "calibrate_tokens": calibrate_tokens,
        "calibrate_length": calibrate_length,
    }
    flags = {
        "model": model,
        "out": out,
        "gate": gate,
        "calibrate": calibrate,
        "tokenizer": tokenizer,
        "again": again or None,
        "scorers_only": scorers_only or None,
        "copy": copy or None,
        "overwrite": overwrite or None,
        "revision": revision,
        "seed": seed,
        "device": device,
        "dtype": dtype,
        "cache_dtype": cache_dtype,
        **{key: options.number(text) for key, text in numbers.items()},
    }
    request = load_recipe(ConvertRecipe, recipe, overrides, flags, verb="convert")
    plan = make_plan(request)
    if options.shown_dry(console, plan, dry_run):
        return
    console.say(f"loading {plan.base.name}")  # seconds, most of them imports
    done = run(plan, console)
    console.result(done.text(), done.data())
    out = quote(str(done.out))
    if request.scorers_only:
        console.say(f"\nnext: sparsek merge {quote(request.model)} {out} OUT")
        return
    last_model.remember(done.out)
    if done.tokenizer == NONE:
        console.say("\nit writes no text without a tokenizer: convert with --tokenizer NAME")
        return
    if plan.base.source == "bundled":  # a stranger's first model: "hello" tells nothing of it
        console.say(f"\nnext: sparsek chat {out} --load FILE  # it answers about a text, no more")
    else:
        console.say(f"\nnext: sparsek chat {out}")
    # Four samples a task: all of them take hours of a CPU.
    rivals = "--baselines dense,window,random --limit 4"
    console.say(f"      sparsek evaluate {out} --tasks ppl,recall {rivals}")


def _short_names() -> tuple[str, dict]:
    from sparsek_cli.model_folder.short_names import BUNDLED, SHORT_NAMES

    rows = [(name, "llama", "bundled, works offline") for name in BUNDLED]
    rows += [
        (name, row.family, row.hub_id + (" (gated)" if row.gated else ""))
        for name, row in SHORT_NAMES.items()
    ]
    width = max(len(name) for name, _, _ in rows)
    text = "\n".join(f"{name:<{width}}  {family:<8}  {where}" for name, family, where in rows)
    return text, {name: {"family": family, "source": where} for name, family, where in rows}
