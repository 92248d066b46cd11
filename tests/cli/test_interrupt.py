"""Ctrl-C in every verb, and SIGTERM: exit 130, one message, no traceback."""

import importlib
import signal
import subprocess
import sys

import pytest
from patience import PATIENCE


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("sparsek_cli.hub.resolve", ["convert", "tiny"]),
        ("sparsek_cli.hub.resolve", ["finetune", "base", "out"]),
        ("sparsek_cli.commands.last_model.name_or_default", ["evaluate", "--tasks", "ppl"]),
        ("sparsek_cli.hub.resolve", ["chat", "tiny", "--prompt", "x"]),
        ("sparsek_cli.hub.resolve", ["doctor", "tiny"]),
        ("sparsek_cli.benchmarks.layer.measure", ["bench", "--device", "cpu"]),
        ("sparsek_cli.recipes.shipped.recipe_names", ["recipes", "list"]),
    ],
)
def test_interrupted(sparsek, monkeypatch, tmp_path, place, words):
    def stop(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    module, name = place.rsplit(".", 1)
    monkeypatch.setattr(importlib.import_module(module), name, stop)
    shown = sparsek(*words)
    assert shown.failed(130), shown
    assert not [path for path in tmp_path.rglob("*") if path.name != "state"]


TEXT = "a few words and then a few more of them. " * 500


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("words", "until", "kept"),
    [
        (["convert", "tiny"], "calibrating", []),
        (["convert", "tiny", "--calibrate", "text.txt"], "calibrating on", []),
        (["finetune", "tiny", "out", "train=all", "--data", "text.txt"], "step 1/", []),
        (
            ["finetune", "tiny", "out", "train=all", "save_steps=1", "--data", "text.txt"],
            "step 2/",
            ["out.part"],
        ),
    ],
)
def test_long_work_in_a_real_process(tmp_path, words, until, kept, number):
    """What a person sees who gives up halfway: two lines, and only what can be resumed."""
    (tmp_path / "text.txt").write_text(TEXT)
    small = ["sequence_length=32", "batch_size=2", "log_steps=1", "evaluation.held_out=0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "sparsek_cli", *words, *small * (words[0] == "finetune")],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        said = ""
        for line in process.stderr:
            said += line
            if until in line:
                break
        process.send_signal(number)
        out, rest = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    last = rest.strip().splitlines()[-2:]
    assert process.returncode == 130, said + rest
    assert [line.split(":")[0] for line in last] == ["error", "hint"], said + rest
    assert "Traceback" not in rest and out == ""
    left = {path.name for path in tmp_path.iterdir()} - {"state", "text.txt"}
    assert sorted(left) == kept
