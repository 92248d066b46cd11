"""`sparsek bench`: how fast attention, training steps, decoding and generation are here."""

from pathlib import Path
from typing import Annotated

import typer

from sparsek_cli.commands import options
from sparsek_cli.console import Console
from sparsek_cli.errors import UsageError

Value = typer.Option
PICTURES = (".png", ".svg", ".pdf", ".jpg", ".jpeg", ".webp")
WHAT = ("attention", "train", "decode", "generate")
# What one of them takes and the others do not: a figure of another shape would be believed.
OF_A_LAYER = ("heads", "dim", "topk", "window", "sinks", "gate", "against")
OF_A_MODEL = ("model", "tokens")


def bench(
    context: typer.Context,
    what: Annotated[
        str, typer.Argument(metavar="WHAT", help="attention, train, decode or generate.")
    ] = "attention",
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="For generate: a converted model.")
    ] = None,
    lengths: Annotated[
        str | None, Value("--lengths", metavar="N,N", help="Context lengths.")
    ] = None,
    heads: Annotated[str, Value("--heads", metavar="H/G", help="Query heads/KV heads.")] = "32/8",
    dim: Annotated[int, Value("--dim", metavar="N", min=1, help="Head size.")] = 128,
    topk: Annotated[int, Value("--topk", metavar="N", min=0, help="Selected keys.")] = 1024,
    window: Annotated[int, Value("--window", metavar="N", min=1, help="Newest keys.")] = 1024,
    sinks: Annotated[int, Value("--sinks", metavar="N", min=0, help="First tokens.")] = 0,
    batch: Annotated[int, Value("--batch", metavar="N", min=1, help="Sequences.")] = 1,
    gate: Annotated[
        str, Value("--gate", metavar="GATE", help="straight_through, log or kv.")
    ] = "straight_through",
    against: Annotated[
        str | None,
        Value("--against", metavar="A,B", help="sdpa, sdpa-flash, sdpa-cudnn, flex, fla-nsa."),
    ] = None,
    tokens: Annotated[int, Value("--tokens", metavar="N", min=1, help="For generate.")] = 256,
    repeats: Annotated[
        int | None,
        Value("--repeats", metavar="N", min=1, help="Median of so many [20; generate: 3]."),
    ] = None,
    plot: Annotated[str | None, Value("--plot", metavar="FILE", help="Write a plot.")] = None,
    overwrite: Annotated[bool, Value("--overwrite", help="Replace the plot's FILE.")] = False,
    seed: options.Seed = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Time the kernels beside their rivals: same process, same random data, checked first."""
    if what not in WHAT:
        raise UsageError(f"cannot bench '{what}'", hint=f"choose one of {', '.join(WHAT)}")
    _check_all_count(context, what)
    console = Console(as_json=json, quiet=quiet)
    if plot:
        if Path(plot).suffix.lower() not in PICTURES:
            raise UsageError(
                f"--plot {plot} names no kind of picture", hint=f"end it in {', '.join(PICTURES)}"
            )
        from sparsek_cli.output.place import absolute, check_file, check_not_inside

        plot = str(absolute(plot))
        check_not_inside(Path(plot), None)
        check_file(Path(plot), overwrite=overwrite, suffixes=PICTURES)
    from sparsek_cli.devices import choose_device, choose_dtype

    where = choose_device(device)
    kind = choose_dtype(dtype, where)
    tokens_of = _numbers(lengths or _usual_lengths(what, where.type))
    if what == "generate":
        rows, names, extra = _generate(
            console, model, tokens_of, batch, tokens, repeats or 3, seed, where, kind
        )
    else:
        from sparsek_kernels.attention import GATES

        if gate not in GATES:
            raise UsageError(f"unknown gate '{gate}'", hint=f"the gates are {', '.join(GATES)}")
        if what == "decode" and gate != "straight_through":
            raise UsageError(
                f"decode is not timed under gate {gate}: its state holds pairs without number",
                hint="leave --gate out, or time the attention of one",
            )
        query, kv = _heads(heads)
        from sparsek_cli.benchmarks.case import Shape

        shape = Shape(query, kv, dim, topk, window, sinks, batch, gate, kind, where, seed or 0)
        console.say(_conditions(what, shape))
        rows, names, extra = _layer(console, what, shape, tokens_of, against, repeats or 20)
    if plot:
        from sparsek_cli.benchmarks.report import plot as draw

        draw(what, rows, names, plot)
        console.say(f"wrote {plot}")
    if json:
        console.result("", {"what": what, **extra, "rows": rows})


def _usual_lengths(what: str, device: str) -> str:
    if device == "cuda":
        return "4096,16384,32768,65536,131072"
    # A step is timed over full slots, which are 2,048 unless something else is said.
    return "4096,8192,16384" if what == "decode" else "512,1024,2048"


def _check_all_count(context: typer.Context, what: str) -> None:
    """Raises UsageError for words and flags that do not count for what is timed."""
    names = OF_A_LAYER if what == "generate" else OF_A_MODEL
    sources = {name: context.get_parameter_source(name) for name in names}
    # By name: typer has click's enumeration, or one of its own.
    given = [n for n, source in sources.items() if source is not None and source.name != "DEFAULT"]
    if not given:
        return
    shown = "MODEL" if given[0] == "model" else f"--{given[0]}"
    other = "attention, train or decode" if what == "generate" else "generate"
    why = "its shape is the model's" if what == "generate" else "its data are random"
    raise UsageError(f"bench {what} takes no {shown}: {why}", hint=f"leave it out, or time {other}")


def _layer(console, what, shape, lengths, against, repeats):
    from dataclasses import asdict

    from sparsek_cli.benchmarks import decode, layer, report
    from sparsek_cli.benchmarks.rivals import RIVALS, default_rivals

    rivals = against.split(",") if against else default_rivals(shape.device)
    unknown = [name for name in rivals if name not in RIVALS and name != "none"]
    if unknown:
        raise UsageError(f"unknown rival '{unknown[0]}'", hint=f"choose from {', '.join(RIVALS)}")
    rivals = [name for name in rivals if name != "none"]
    others = [name for name in rivals if name != "sdpa"]
    if what == "decode" and against and others:
        raise UsageError(f"decode has no rival '{others[0]}'", hint="give --against sdpa or none")
    extra = {"shape": asdict(shape)}
    if what == "decode":
        slots = shape.sinks + shape.topk + shape.window
        if max(lengths) <= slots:
            raise UsageError(
                f"--lengths {max(lengths)}: a step is timed over full slots, and there are {slots}",
                hint=f"name lengths above {slots}, or fewer slots (--topk, --window)",
            )
        names = ["sparsek", *(["sdpa"] if rivals else [])]
        measured = decode.measure(
            lengths, shape, dense=bool(rivals), repeats=repeats, say=console.say
        )
        header, line = report.decode_header(names), report.decode_line
    else:
        names = ["sparsek", *rivals]
        train = what == "train"
        extra["errors"] = layer.check(shape, backward=train)
        shown = ", ".join(f"{name} {value:.1e}" for name, value in extra["errors"].items())
        console.say(f"checked against float64: {shown}")
        measured = layer.measure(
            lengths, shape, rivals, train=train, repeats=repeats, say=console.say
        )
        header, line = report.layer_header(names), report.layer_line
    rows = []
    show = _shown(console)
    show(header)
    for row in measured:
        rows.append(row)
        show(line(row, names))
    if what != "decode":
        extra["break_even"] = layer.break_even(rows)
        if extra["break_even"]:
            console.say(f"ahead of dense from {extra['break_even']:.0f} tokens on")
    return rows, names, extra


def _generate(console, name, lengths, batch, tokens, repeats, seed, device, dtype):
    from sparsek_cli import hub
    from sparsek_cli.benchmarks import generate, report
    from sparsek_cli.loading import load_model

    if name is None:
        raise UsageError("generate needs a model", hint="sparsek bench generate MODEL")
    model = load_model(hub.resolve(name, None), device=device, dtype=dtype)
    rows = []
    show = _shown(console)
    show(report.generate_header())
    for row in generate.measure(
        model, lengths, batch=batch, tokens=tokens, repeats=repeats, seed=seed or 0,
        say=console.say,
    ):  # fmt: skip
        rows.append(row)
        show(report.generate_line(row))
    return rows, [], {"model": name}


def _shown(console):
    """Where rows go as they come: to stderr if stdout is for the JSON document at the end."""
    return console.say if console.as_json else lambda text: console.result(text, None)


def _conditions(what: str, shape) -> str:
    import torch

    name = torch.cuda.get_device_name(shape.device) if shape.device.type == "cuda" else "cpu"
    return (
        f"{what} on {name}, torch {torch.__version__}, {str(shape.dtype).removeprefix('torch.')}, "
        f"batch {shape.batch}, {shape.heads}/{shape.kv_heads} heads of {shape.head_dim}, "
        f"k {shape.topk}, window {shape.window}, sinks {shape.sinks}, gate {shape.gate}"
    )


def _heads(text: str) -> tuple[int, int]:
    from sparsek_cli.recipes.limits import MOST_HEADS

    parts = text.split("/")
    if len(parts) != 2 or not all(part.isdigit() and int(part) for part in parts):
        raise UsageError(f"--heads {text} is not H/G", hint="for instance --heads 32/8")
    if max(map(len, parts)) > 9 or max(map(int, parts)) > MOST_HEADS:
        raise UsageError(
            f"--heads {text[:40]}: no model has over {MOST_HEADS:,}",
            hint="for instance --heads 32/8",
        )
    query, kv = map(int, parts)
    if query % kv:
        raise UsageError(
            f"{query} query heads cannot share {kv} KV heads",
            hint="the first number must be a multiple of the second",
        )
    return query, kv


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(word) for word in text.replace("_", "").split(",") if word.strip()]
    except ValueError as error:
        raise UsageError(
            f"--lengths {text} is no list of numbers", hint="for instance --lengths 4096,8192"
        ) from error
    if not numbers or min(numbers) < 1:
        raise UsageError(f"--lengths {text}: a length is at least 1", hint="--lengths 4096,8192")
    from sparsek_cli.recipes.limits import LONGEST

    if max(numbers) > LONGEST:
        raise UsageError(
            f"--lengths {text[:40]}: a length is at most {LONGEST:,}", hint="--lengths 4096,8192"
        )
    return numbers
