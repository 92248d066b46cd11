"""The error boundary: every failure is `error:` and `hint:`, with the right exit code."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from sparsek_cli.commands import doctor as doctor_command
from sparsek_cli.errors import SparsekError

VERBS = (
    "convert", "finetune", "evaluate", "eval", "chat", "export", "merge", "push", "bench", "doctor",
    "recipes",
)  # fmt: skip
PYTHON = [sys.executable, "-m", "sparsek_cli"]


def test_help_is_complete(sparsek):
    shown = sparsek("--help")
    assert shown.code == 0 and shown.err == ""
    for verb in VERBS:
        assert verb == "eval" or f"  {verb}" in shown.out
        assert sparsek(verb, "--help").code == 0
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
        (PermissionError(errno.EACCES, "Permission denied", "x.bin"), 1, "no permission for x.bin"),
        (OSError(errno.EROFS, "Read-only file system", "x.bin"), 1, "no permission for x.bin"),
        (FileNotFoundError(errno.ENOENT, "No such file", "x.bin"), 1, "No such file: x.bin"),
        (MemoryError(), 1, "out of memory"),
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
        # What the help of all verbs needs is Typer and the verbs' own flags.
        f"early = [m for m in {[*heavy, 'pydantic', 'rich', 'json', 'sysconfig']} "
        "if m in sys.modules]\n"
        "own = {m.split('.')[1] for m in sys.modules if m.startswith('sparsek_cli.')}\n"
        "early += own - {'app', 'commands', 'console', 'errors'}\n"
        # Typer itself reads a verb's options with pydantic, so that one is allowed from here on.
        "for verb in ('convert', 'finetune', 'evaluate', 'chat', 'doctor', 'recipes'):\n"
        "    run([verb, '--help'])\n"
        f"loaded = [m for m in {heavy} if m in sys.modules]\n"
        "sys.exit(f'loaded: {loaded}, early: {early}' if loaded or early else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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


def test_no_colour_in_a_pipe_and_errors_on_stderr():
    done = subprocess.run([*PYTHON, "nope"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and "\x1b" not in done.stderr


def test_ctrl_c_in_a_real_process():
    """`chat` waits for its pipe; Ctrl-C ends it with 130 and without a traceback."""
    process = subprocess.Popen(
        [*PYTHON, "chat", "nowhere"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(2)  # imports; it then blocks on stdin for as long as nobody writes
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130, (out, err)
    assert err.startswith("error: interrupted") and "Traceback" not in err
