"""`sparsek chat`: talk to a converted (or plain) model, or ask it one thing and leave."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from sparsek_cli.commands import options
from sparsek_cli.console import Console
from sparsek_cli.errors import UsageError

if TYPE_CHECKING:
    from sparsek_cli.dialogue.session import Session


def chat(
    model: options.Model = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt", metavar="TEXT", help="Answer once and exit; a pipe does the same."
        ),
    ] = None,
    load: Annotated[
        list[str] | None,
        typer.Option("--load", metavar="PATH", help="Read a text file or folder first."),
    ] = None,
    state: Annotated[
        str | None,
        typer.Option("--state", metavar="FILE", help="Go on from what /save-state wrote."),
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="System message.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", metavar="N", min=1, help="Longest reply.")
    ] = 256,
    temperature: Annotated[
        float, typer.Option("--temperature", metavar="T", min=0, help="0 takes the likeliest.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option("--top-p", metavar="P", help="Draw from the likeliest mass P.")
    ] = 1.0,
    revision: options.Revision = None,
    seed: options.Seed = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    cache_dtype: options.CacheDtype = None,
    yarn: options.Yarn = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Talk to a model; its cache stays the same size however long the text."""
    from sparsek_cli import hub
    from sparsek_cli.commands.last_model import name_or_default
    from sparsek_cli.dialogue.drawing.sampling import Sampling
    from sparsek_cli.dialogue.drawing.settings import check_sampling

    console = Console(as_json=json, quiet=quiet, verbose=verbose)
    sampling = Sampling(temperature, top_p, max_new_tokens, 0 if seed is None else seed)
    check_sampling(sampling)
    if prompt is None and not sys.stdin.isatty():
        prompt = _read_pipe()
    if prompt is not None and not prompt.strip() and not load:
        raise UsageError("the prompt is empty", hint="give --prompt TEXT, or pipe some text in")
    if json and prompt is None:
        raise UsageError("--json needs a question", hint="give --prompt TEXT, or pipe some text in")
    checkpoint = hub.resolve(name_or_default(model, say=console.say), revision)
    console.say(f"loading {checkpoint.name}")  # seconds, most of them imports

    from sparsek_cli.devices import choose_device, choose_dtype
    from sparsek_cli.dialogue.drawing.own_settings import in_words
    from sparsek_cli.dialogue.engine import Engine
    from sparsek_cli.dialogue.session import Session
    from sparsek_cli.loading import (
        check_tokenizer,
        embedding_rows,
        load_model,
        load_tokenizer,
    )
    from sparsek_cli.output.place import absolute

    where = choose_device(device)
    tokenizer = load_tokenizer(checkpoint)
    number = choose_dtype(dtype, where)
    weights = load_model(checkpoint, device=where, dtype=number, cache_dtype=cache_dtype, yarn=yarn)
    check_tokenizer(tokenizer, embedding_rows(weights), checkpoint.name)
    session = Session(Engine(weights), tokenizer, sampling, system)
    if not session.engine.sparse:
        console.say(f"{checkpoint.name} is a dense model: its cache grows with every token")
    if state is not None:
        session.load_state(absolute(state))
        console.say(f"continuing {state}: {session.engine.tokens:,} tokens in context")
    if own := in_words(weights):
        console.say(f"generation_config.json: {own}")
    if session.plain:
        console.say(f"{checkpoint.name} has no chat template: it continues your text")
    if prompt is not None:
        _answer_once(session, prompt, load or [], console, checkpoint.name)
    else:
        _converse(session, load or [], console, checkpoint.name)


def _read_pipe() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig").strip("\n")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"the piped text is not UTF-8 (byte {error.start})", hint="convert it first: iconv"
        ) from error


def _answer_once(
    session: "Session", prompt: str, files: list[str], console: Console, name: str
) -> None:
    from dataclasses import asdict

    from sparsek_cli.dialogue.figures import beyond, status_line
    from sparsek_cli.dialogue.files import load_path
    from sparsek_cli.loading.positions import can_stretch

    engine = session.engine
    for file in files:
        load_path(session, file, progress=console.progress)
        _stop_if(engine.interrupted)
    pieces = []
    for piece in session.ask(prompt):
        pieces.append(piece)
        if not console.as_json:
            console.show(piece)
    if not console.as_json:
        console.show("\n")
    _stop_if(engine.interrupted)
    stats = session.stats()
    if console.as_json:
        console.result("", {"model": name, "reply": "".join(pieces), **asdict(stats)})
    if stats.reply_at_limit:
        console.say(f"the reply was cut at {stats.reply_tokens:,} tokens (--max-new-tokens)")
    if said := beyond(
        engine.tokens, engine.context_limit, stretches=can_stretch(engine.model.config)
    ):
        console.say(said)
    console.say(status_line(stats, sparse=engine.sparse, limit=engine.context_limit))


def _stop_if(interrupted: bool) -> None:
    # There is no conversation to go on with, so here Ctrl-C ends the program.
    if interrupted:
        raise KeyboardInterrupt


def _converse(session: "Session", files: list[str], console: Console, name: str) -> None:
    from sparsek_cli.commands.last_model import state_file
    from sparsek_cli.dialogue.repl import Repl
    from sparsek_cli.dialogue.terminal import terminal_reader

    repl = Repl(session, say=console.say, show=console.show, progress=console.progress)
    console.say(f"{name}: /help lists the commands, Ctrl-D leaves")
    for file in files:
        repl.handle(f"/load {file}")
    repl.run(terminal_reader(repl, state_file().with_name("chat-history")))
