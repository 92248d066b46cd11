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


@pytest.mark.parametrize("saves", [False, True])
def test_resume_is_said_where_it_finds_a_checkpoint(
    saves, sparsek, converted, tmp_path, monkeypatch
):
    """It was said of every run, and refused by one that had none yet."""
    from sparsek_cli.training.trainer import SparsekTrainer

    real = SparsekTrainer.training_step

    def step(self, *args, **options):
        if self.state.global_step == 1:
            raise KeyboardInterrupt
        return real(self, *args, **options)

    monkeypatch.setattr(SparsekTrainer, "training_step", step)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    words = ["finetune", converted, "out", "--data", "text.txt", "--steps", 2, "--device", "cpu"]
    words += ["sequence_length=32", "batch_size=1", "evaluation.held_out=0"]
    words += [f"save_steps={int(saves)}"]
    shown = sparsek(*words)
    hint = shown.err.strip().splitlines()[-1]
    assert shown.failed(130)
    again = "the same command with --resume goes on" if saves else "run the same command again"
    assert hint == f"hint: {again}"
    assert (tmp_path / "out.part").exists() == saves
    monkeypatch.setattr(SparsekTrainer, "training_step", real)
    assert sparsek(*words, *["--resume"] * saves).code == 0, "as hinted"
    # Of another command nothing is remembered.
    monkeypatch.setattr("sparsek_cli.hub.resolve", _stop)
    assert "--resume" not in sparsek("convert", "tiny").err


def _stop(*args, **options):
    raise KeyboardInterrupt


def test_an_unfinished_run_without_a_checkpoint_is_not_to_be_resumed(sparsek, tmp_path):
    run = tmp_path / "out.part"
    run.mkdir()
    (run / "recipe.yaml").write_text("steps: 2")
    shown = sparsek("chat", run, "--prompt", "x")
    assert shown.failed(2) and "no checkpoint yet" in shown.err and "--resume" not in shown.err
    (run / "checkpoint-1").mkdir()
    assert "with --resume" in sparsek("chat", run, "--prompt", "x").err


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
