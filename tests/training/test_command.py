"""`sparsek finetune` as a user types it."""

import json
import os
import subprocess
import sys

import pytest


def run(*words, **environment):
    return subprocess.run(
        [sys.executable, "-m", "sparsek_cli", "finetune", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )


def test_a_run_with_flags_and_words(text_file, sparse_checkpoint, tmp_path):
    model, out = sparse_checkpoint(), tmp_path / "out"
    words = ["sequence_length=64", "batch_size=2", "evaluation.sequences=1", "--device", "cpu"]
    done = run(model, out, "--data", text_file, "--steps", 2, "--json", *words)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["steps"] == 2 and result["output"] == str(out)
    assert "tokens/s" in done.stderr and "left" in done.stderr
    again = run(model, out, "--data", text_file, *words)
    assert again.returncode == 2
    assert again.stderr.startswith("error:") and "hint:" in again.stderr
    assert "Traceback" not in again.stderr and "exists" in again.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "MODEL is missing"),
        (("nowhere/at/all", "out"), "no such folder"),
        (("--recipe", "scorrers"), "did you mean 'scorers.finetune'"),
        (("tiny", "out", "learning_rat=1"), "did you mean 'learning_rate'"),
        (("tiny", "out", "steps=many"), "'steps'"),
    ],
)
def test_mistakes_are_explained(words, message, tmp_path):
    from typer.testing import CliRunner

    from sparsek_cli.app import app
    from sparsek_cli.errors import UsageError

    result = CliRunner().invoke(app, ["finetune", *words])
    assert isinstance(result.exception, UsageError)
    assert message in f"{result.exception.message} {result.exception.hint}"
