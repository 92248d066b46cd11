"""The error boundary: every failure is `error:` and `hint:`, with the right exit code."""

import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from patience import PATIENCE
from typer.core import TyperCommand

from sparsek_cli.app import app
from sparsek_cli.commands import doctor as doctor_command
from sparsek_cli.commands import verbs
from sparsek_cli.errors import SparsekError

VERBS = (
    "convert", "finetune", "evaluate", "eval", "chat", "serve", "export", "merge", "push", "bench",
    "doctor", "recipes",
)  # fmt: skip
PYTHON = [sys.executable, "-m", "sparsek_cli"]


def test_help_is_complete(sparsek):
    shown = sparsek("--help")
    assert shown.code == 0 and shown.err == ""
    said = " ".join(shown.out.split())
    assert all(f" {name} {about}" in said for name, about in verbs.ABOUT.items()), "whole lines"
    for verb in VERBS:
        assert verb == "eval" or f"  {verb}" in shown.out
        assert sparsek(verb, "--help").code == 0
    for words in (*([verb] for verb in VERBS), ["recipes", "show"], ["recipes", "copy"]):
        assert not re.search(r"<(str|list|int)\b", sparsek(*words, "--help").out), words
    assert sparsek("--version").out.startswith("sparsek ")


def test_no_verb_shows_help_as_a_usage_error(sparsek):
    shown = sparsek()
    assert shown.code == 2 and "Usage: sparsek" in shown.err and shown.out == ""


@pytest.mark.parametrize(
    ("words", "error", "hint"),
    [
        (["conver"], "no such verb: 'conver'", "did you mean 'convert'?"),
        (["zzz"], "no such verb: 'zzz'", "the verbs are"),
        (["doctor", "--devise", "cpu"], "no such option: --devise", "did you mean '--device'?"),
        (["--nope"], "no such option: --nope", "--help"),
        (["chat", "--seed", "many"], "--seed", "sparsek chat --help"),
        (["chat", "--seed"], "--seed", "sparsek chat --help"),
        (["recipes", "shw", "x"], "no such verb: 'shw'", "did you mean 'show'?"),
        (["recipes", "show"], "NAME", "sparsek recipes show --help"),
    ],
)
def test_usage_errors(sparsek, words, error, hint):
    shown = sparsek(*words)
    assert shown.failed(2), shown
    assert error in shown.err and hint in shown.err and shown.out == ""


@pytest.mark.parametrize(
    ("raised", "code", "error"),
    [
        (SparsekError("it broke", hint="mend it"), 1, "error: it broke"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (OSError(errno.ENOSPC, "No space left on device", "x.bin"), 1, "the disk is full"),
        (OSError(errno.ENOSPC, "No space left", "a", None, "b"), 1, "is full while writing b"),
        (PermissionError(errno.EACCES, "Permission denied", "x.bin"), 1, "no permission for x.bin"),
        (OSError(errno.EROFS, "Read-only file system", "x.bin"), 1, "no permission for x.bin"),
        (FileNotFoundError(errno.ENOENT, "No such file", "x.bin"), 1, "No such file: x.bin"),
        (OSError(errno.EFBIG, "File too large"), 1, "hint: raise the limit on a file's size"),
        (OSError(errno.EMFILE, "Too many open files"), 1, "error: Too many open files"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 1, "the disk is full"),
        (
            FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']"),
            1,
            "hint: set TMPDIR",
        ),
        (MemoryError(), 1, "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, "out of memory"),
        (RuntimeError("first\nsecond"), 1, "error: RuntimeError: first"),
        (ValueError(), 1, "error: ValueError"),
    ],
)
def test_whatever_a_verb_raises(sparsek, monkeypatch, raised, code, error):
    def fail(*args, **options):
        raise raised

    monkeypatch.setattr(doctor_command, "Console", fail)
    shown = sparsek("doctor")
    assert shown.failed(code), shown
    assert error in shown.err


@pytest.mark.parametrize("words", [["--debug", "doctor"], ["doctor", "--debug"]])
def test_debug_shows_where(sparsek, monkeypatch, words):
    def fail(*args, **options):
        raise RuntimeError("deep")

    monkeypatch.setattr(doctor_command, "Console", fail)
    shown = sparsek(*words)
    assert shown.code == 1 and "Traceback" in shown.err and "error: RuntimeError: deep" in shown.err


def test_help_imports_nothing_heavy():
    heavy = ["torch", "transformers", "datasets", "lm_eval", "numpy", "huggingface_hub", "yaml"]
    code = (
        "import sys; from sparsek_cli.app import run\n"
        "run(['--help'])\n"
        # What the help of all verbs needs is Typer and a line of each.
        f"early = [m for m in {[*heavy, 'pydantic', 'rich', 'json', 'sysconfig']} "
        "if m in sys.modules]\n"
        "own = {m.partition('.')[2] for m in sys.modules if m.startswith('sparsek_cli.')}\n"
        "early += own - {'app', 'commands', 'commands.verbs', 'console', 'errors', 'termination'}\n"
        # Typer itself reads a verb's options with pydantic, so that one is allowed from here on.
        "for verb in ('convert', 'finetune', 'evaluate', 'chat', 'doctor', 'recipes'):\n"
        "    run([verb, '--help'])\n"
        f"loaded = [m for m in {heavy} if m in sys.modules]\n"
        "sys.exit(f'loaded: {loaded}, early: {early}' if loaded or early else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_list_of_verbs_says_what_their_own_help_says():
    for name, command in typer.main.get_command(app).commands.items():
        about = verbs.ABOUT[verbs.HIDDEN.get(name, name)]
        listed = TyperCommand(name, help=about).get_short_help_str(300)
        assert command.name == name and listed == command.get_short_help_str(300), name
        assert command.hidden == (name in verbs.HIDDEN)


def test_importing_the_package_costs_nothing():
    code = (
        "import sys; before = set(sys.modules); import sparsek_cli\n"
        "print(len(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == 1


@pytest.mark.parametrize(
    ("given", "policy"), [({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")]
)
def test_threads_wait_without_spinning(given, policy):
    code = (
        "import atexit, os, sys\n"
        "atexit.register(lambda: print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules))\n"
        "from sparsek_cli.app import main; sys.argv[1:] = ['recipes', 'list']; main()"
    )
    kept = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**kept, **given}, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == f"{policy} False", done.stderr


def test_broken_pipe_is_quiet():
    # `head` is gone before anything is written.
    command = f"{' '.join(PYTHON)} chat --help | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("words", "streams", "code", "says"),
    [
        ("recipes list", "<&- >&- 2>&-", 0, []),
        ("recipes list", "> /dev/full", 1, ["error: the disk is full", "hint: free some"]),
        ("nope", "2> /dev/full", 2, []),
        ("nope", "<&- >&-", 2, ["error: no such verb: 'nope'", "hint: the verbs"]),
    ],
)
def test_streams_that_are_closed_or_full(words, streams, code, says):
    command = f"{' '.join(PYTHON)} {words} {streams}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    lines = done.stderr.splitlines()
    assert done.returncode == code and len(lines) == len(says), done
    assert all(line.startswith(start) for line, start in zip(lines, says, strict=True)), done


@pytest.mark.parametrize("streams", ["2> /dev/full", "2> >(true)"])
def test_progress_that_cannot_be_shown_ends_no_run(streams):
    """Hours of training would end because a log's disk is full, or because its reader left."""
    code = (
        "import sys, time; from sparsek_cli.console import Console\n"
        "time.sleep(0.3); Console().say('step 1'); Console().say('step 2'); print('done')"
    )
    command = ["bash", "-c", f'"$@" {streams}', "bash", sys.executable, "-c", code]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    assert (done.returncode, done.stdout) == (0, "done\n")


def test_closed_streams_keep_their_numbers(tmp_path):
    """A file that is opened next does not get stdout's number, and with it all that is printed."""
    code = (
        "import os, sys; from sparsek_cli.console import open_closed_streams\n"
        "open_closed_streams()\n"
        "number = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)\n"
        "print('a result'); print('a note', file=sys.stderr); sys.exit(number)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "file")]
    done = subprocess.run(["bash", "-c", '"$@" <&- >&- 2>&-', "bash", *command])
    assert done.returncode > 2 and (tmp_path / "file").read_bytes() == b""


@pytest.mark.parametrize("words", [["export", "x", "out"], ["convert", "tiny"]])
def test_a_current_folder_that_is_gone(sparsek, monkeypatch, tmp_path, words):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here").rmdir()
    shown = sparsek(*words, "--dry-run")
    assert shown.failed(shown.code) and shown.code in (1, 2), shown
    assert words[0] == "export" or "the folder you are in is gone" in shown.err


def test_convert_takes_the_number_format_of_the_cache_as_chat_does(sparsek, tmp_path):
    words = ["convert", "tiny", tmp_path / "out", "--calibrate", "none", "--dry-run"]
    assert " always, in int8; dense at" in sparsek(*words, "--cache-dtype", "int8").out
    refused = sparsek(*words, "--cache-dtype", "int4")
    assert refused.failed(2) and "cache_dtype" in refused.err


def test_no_colour_in_a_pipe_and_errors_on_stderr():
    done = subprocess.run([*PYTHON, "nope"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and "\x1b" not in done.stderr


def wait_until_idle(process: subprocess.Popen) -> None:
    """Until it sleeps, and does so whenever it is looked at for a second."""
    until, idle = time.monotonic() + PATIENCE, 0
    while idle < 20:
        assert process.poll() is None and time.monotonic() < until
        state = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
        idle = idle + 1 if state == "S" else 0
        time.sleep(0.05)


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="needs the states of processes")
def test_ctrl_c_in_a_real_process():
    """`chat` waits for its pipe; Ctrl-C ends it with 130 and without a traceback."""
    process = subprocess.Popen(
        [*PYTHON, "chat", "nowhere"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until_idle(process)  # after its imports, on stdin, to which nobody writes
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, (out, err)
    assert err.startswith("error: interrupted") and "Traceback" not in err
