"""The `sparsek` command: verbs, global flags, and the one place where errors become messages."""

import errno
import os
import re
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from sparsek_cli import __version__
from sparsek_cli.commands.verbs import Verbs
from sparsek_cli.console import (
    escaped,
    forget,
    open_closed_streams,
    report_error,
    set_up_logging,
)
from sparsek_cli.errors import INTERRUPTED, RAN_AND_FAILED, USAGE, SparsekError, out_of_memory
from sparsek_cli.termination import sigterm_interrupts, was_resumable

# What a process may have too little of, and the shell's word for it.
_LIMITS = {
    errno.EFBIG: "raise the limit on a file's size (ulimit -f), or write less",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "this machine has too many files open: close other programs",
}

app = typer.Typer(
    name="sparsek",
    cls=Verbs,
    help="Convert, fine-tune, evaluate and chat with language models under SparseK attention.",
    invoke_without_command=True,
    suggest_commands=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"sparsek {__version__}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show version.")
    ] = False,
    # Taken out by `run`, so that it may stand anywhere in the line; listed here for --help.
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks; may stand after the verb too.")
    ] = False,
) -> None:
    """Linear-time attention and a constant-size KV cache for the models you already have."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(USAGE)


def main() -> None:
    """Console entry point."""
    # Read when torch loads. By default threads spin while they wait for each other, which takes
    # several times as long as soon as another process wants a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    open_closed_streams()
    set_up_logging(sys.argv[1:])
    # A terminal that has no such letter, or bytes of a file's name: shown, never an error.
    sys.stdout.reconfigure(errors="backslashreplace")
    with sigterm_interrupts():
        code = run()
    try:
        sys.stdout.flush()
    except OSError as error:
        if code == 0 and not isinstance(error, BrokenPipeError):
            message, hint, code = _describe(error, sys.argv[1:])
            report_error(message, hint)
        forget(sys.stdout)
    sys.exit(code)


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb, turns every failure into `error:` / `hint:`, and returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = words[: words.index("--")] if "--" in words else words
    debug = "--debug" in options
    if debug:
        words = [w for w in options if w != "--debug"] + words[len(options) :]
    try:
        outcome = app(args=words, prog_name="sparsek", standalone_mode=False)
        code = outcome if type(outcome) is int else 0
        # Typer turns Ctrl-C into this exit code on its own.
        return _interrupted() if code == INTERRUPTED else code
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted()
    except BrokenPipeError:
        forget(sys.stdout)
        return RAN_AND_FAILED
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else RAN_AND_FAILED if stop.code else 0
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise  # but what tokenizers raises where its own code fails is like any other
        if debug:
            import traceback

            print(escaped(traceback.format_exc()), file=sys.stderr)
        message, hint, code = _describe(error, words)
        report_error(message, hint)
        return code


def _interrupted() -> int:
    goes_on = was_resumable()
    hint = "the same command with --resume goes on" if goes_on else "run the same command again"
    report_error("interrupted", hint)
    return INTERRUPTED


def _describe(error: BaseException, words: Sequence[str]) -> tuple[str, str, int]:
    """Message, hint and exit code of whatever a verb may raise."""
    if isinstance(error, SparsekError):
        return error.message, error.hint, error.exit_code
    if hasattr(error, "format_message"):
        return *_usage(error, words), USAGE
    text = str(error)
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in text:
        # Of a copy the second is what is written; the first is whole, and not to be blamed.
        file = getattr(error, "filename2", None) or getattr(error, "filename", None)
        where = f" while writing {file}" if file else ""
        return f"the disk is full{where}", "free some space, or write elsewhere", RAN_AND_FAILED
    if isinstance(error, PermissionError) or number == errno.EROFS:
        where = getattr(error, "filename", None) or text
        return (
            f"no permission for {where}",
            "choose another folder, or change its rights",
            RAN_AND_FAILED,
        )
    if out_of_memory(error):
        hint = "take a smaller batch, context or chunk, --dtype bfloat16, or --device cpu"
        return "out of memory", hint, RAN_AND_FAILED
    if isinstance(error, FileNotFoundError) and not error.filename and _nowhere():
        hint = "change to a folder that exists, and run the command again"
        return "the folder you are in is gone", hint, RAN_AND_FAILED
    if "usable temporary directory" in text:
        hint = "set TMPDIR to a folder that can be written"
        return "no temporary folder can be written", hint, RAN_AND_FAILED
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        hint = _LIMITS.get(number, "check the path; --debug shows where it happened")
        return f"{error.strerror}{where}", hint, RAN_AND_FAILED
    if "Onig" in text:
        hint = "mend the pattern of its pre-tokenizer (tokenizer.json), or take other text"
        return f"the tokenizer gives up on a text: {text.splitlines()[0]}", hint, RAN_AND_FAILED
    first = f"{type(error).__name__}: {text}".splitlines()[0].rstrip(": ")
    return first, "run again with --debug to see where it happened", RAN_AND_FAILED


def _nowhere() -> bool:
    """Whether the current folder is no more."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


def _usage(error: Exception, words: Sequence[str]) -> tuple[str, str]:
    """A usage error of the command line, with the nearest option or verb."""
    context = getattr(error, "ctx", None)
    verb = context.command_path if context else " ".join(["sparsek", *words[:1]])
    message = re.sub(r"\s+", " ", error.format_message()).strip()
    unknown = getattr(error, "option_name", None)
    possible = getattr(error, "possibilities", None)
    if unknown and possible is not None:
        if possible:
            return f"no such option: {unknown}", f"did you mean '{possible[0]}'?"
        return f"no such option: {unknown}", f"`{verb} --help` lists the options"
    wrong = re.match(r"No such command '(.*?)'", message)
    if wrong:
        from difflib import get_close_matches

        verbs = [*getattr(context.command, "commands", {})]
        near = get_close_matches(wrong[1], verbs, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"the verbs are {', '.join(verbs)}"
        return f"no such verb: '{wrong[1]}'", hint
    return message[:1].lower() + message[1:].rstrip("."), f"`{verb} --help` shows the usage"


if __name__ == "__main__":
    main()
