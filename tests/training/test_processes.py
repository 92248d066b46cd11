"""Two processes train the model that one process trains, and continue what one began."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from sparsek_cli.errors import UsageError
from sparsek_cli.training.run import finetune
from sparsek_cli.training.unfinished import part_folder

WORDS = ["steps=4", "save_steps=2", "batch_size=4", "micro_batch_size=1", "learning_rate=1e-2",
         "data.copies={kind: copies, filler: text, passage: [8, 16], document_length: 32}",
         "objective.answer_weight=0.5"]  # fmt: skip


def launch(
    made, folder, processes: int, *flags: str, program=("-m", "sparsek_cli"), **environment: str
) -> subprocess.CompletedProcess:
    file = folder / "launch.yaml"
    file.write_text(yaml.safe_dump(made.model_dump(mode="json", exclude_none=True)))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}",
        "--master-addr=127.0.0.1", f"--master-port={port}",
        *program, "finetune", "--recipe", str(file), "-q", *flags,
    ]  # fmt: skip
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


@pytest.mark.slow
def test_two_processes_continue_the_run_of_one(recipe, scratch, tmp_path, monkeypatch):
    from sparsek_cli.training.trainer import SparsekTrainer

    sparse = "sparsek={topk: 8, window: 8}"
    one = finetune(recipe(*scratch, *WORDS, sparse, out="one"))
    real = SparsekTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(SparsekTrainer, "training_step", interrupted)
    made = recipe(*scratch, *WORDS, sparse)
    with pytest.raises(KeyboardInterrupt):
        finetune(made)
    assert (part_folder(tmp_path / "out") / "checkpoint-2").is_dir()
    ran = launch(made, tmp_path, 2, "--resume", "--json")
    assert ran.returncode == 0, ran.stderr[-6000:]
    two = yaml.safe_load(ran.stdout)
    assert two["loss"] == pytest.approx(one.loss, abs=1e-4)
    assert two["held_out_loss"] == pytest.approx(one.held_out_loss, abs=1e-4)
    ours, theirs = (load_file(tmp_path / n / "model.safetensors") for n in ("out", "one"))
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name], tensor, atol=2e-3), name


FSDP = (str(Path(__file__).with_name("fsdp_on_cpu.py")),)


def same_weights(one, other, *, within: float = 1e-4):
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.allclose(ours[name].float(), tensor.float(), atol=within), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["objective={lm: 1, distill: 0.5, answer_weight: 0.5}"],
        ["precision=bf16", "checkpointing=true"],
    ],
)
def test_sharded_processes_train_the_model_of_one(recipe, scratch, tmp_path, words):
    words = [*scratch, *WORDS, "sparsek={topk: 8, window: 8}", "save_steps=0", *words]
    one = finetune(recipe(*words, out="one"))
    ran = launch(recipe(*words, "launch.strategy=fsdp"), tmp_path, 2, "--json", program=FSDP)
    assert ran.returncode == 0, ran.stderr[-6000:]
    two = yaml.safe_load(ran.stdout)
    close = 1e-4 if "precision=bf16" not in words else 5e-3
    assert two["loss"] == pytest.approx(one.loss, abs=close)
    assert two["held_out_loss"] == pytest.approx(one.held_out_loss, abs=close)
    same_weights(tmp_path / "out", tmp_path / "one", within=2e-3 if close < 1e-3 else 0.05)


@pytest.mark.slow
def test_a_run_goes_on_sharded_and_whole_again(recipe, scratch, tmp_path):
    words = [*scratch, *WORDS, "sparsek={topk: 8, window: 8}", "steps=5", "save_steps=1"]
    one = finetune(recipe(*words, out="one"))
    whole, sharded = recipe(*words), recipe(*words, "launch.strategy=fsdp")
    part = part_folder(tmp_path / "out")
    # Two sharded processes stop after step 2, one whole process after step 4, then sharded again.
    assert launch(sharded, tmp_path, 2, program=FSDP, STOP_AT="2").returncode != 0
    assert (part / "checkpoint-2").is_dir()
    assert not list(part.glob("*/*.bin")) and not list(part.glob("*/*.pt"))
    ran = launch(whole, tmp_path, 1, "--resume", program=FSDP, STOP_AT="4")
    assert (part / "checkpoint-4").is_dir(), ran.stderr[-2000:]
    ran = launch(sharded, tmp_path, 2, "--resume", "--json", program=FSDP)
    assert ran.returncode == 0, ran.stderr[-6000:]
    assert yaml.safe_load(ran.stdout)["loss"] == pytest.approx(one.loss, abs=1e-4)
    same_weights(tmp_path / "out", tmp_path / "one", within=2e-3)


@pytest.mark.slow
def test_scorers_are_sharded_and_saved(recipe, sparse_checkpoint, tmp_path):
    model = sparse_checkpoint()
    words = ["objective={lm: 0, distill: 1}", "keep_better=false", "scorer_learning_rate=1e-2",
             "micro_batch_size=1"]  # fmt: skip
    finetune(recipe(*words, model=model, out="one"))
    made = recipe(*words, "launch.strategy=fsdp", model=model)
    ran = launch(made, tmp_path, 2, program=FSDP)
    assert ran.returncode == 0, ran.stderr[-6000:]
    ours, theirs = (load_file(tmp_path / n / "sparsek.safetensors") for n in ("out", "one"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name], tensor, atol=1e-4), name


@pytest.mark.parametrize(
    ("words", "world", "message"),
    [
        (["launch.strategy=fsdp"], "1", "there is one"),
        (["launch.strategy=fsdp"], "2", "needs GPUs"),
        (["launch.offload=true"], "1", "needs something sharded"),
    ],
)
def test_what_cannot_run_is_refused(recipe, scratch, monkeypatch, words, world, message):
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(UsageError, match=message):
        finetune(recipe(*scratch, *words), dry_run=True)
