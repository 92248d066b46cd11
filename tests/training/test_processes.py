"""Two processes train the model that one process trains, and continue what one began."""

import os
import socket
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from sparsek_cli.training.run import finetune
from sparsek_cli.training.unfinished import part_folder

WORDS = ["steps=4", "save_steps=2", "batch_size=4", "micro_batch_size=1", "learning_rate=1e-2",
         "data.copies={kind: copies, filler: text, passage: [8, 16], document_length: 32}",
         "objective.answer_weight=0.5"]  # fmt: skip


def launch(made, folder, processes: int, *flags: str) -> subprocess.CompletedProcess:
    file = folder / "launch.yaml"
    file.write_text(yaml.safe_dump(made.model_dump(mode="json", exclude_none=True)))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}",
        "--master-addr=127.0.0.1", f"--master-port={port}",
        "-m", "sparsek_cli", "finetune", "--recipe", str(file), "-q", *flags,
    ]  # fmt: skip
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
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
    assert ran.returncode == 0, ran.stderr[-2000:]
    two = yaml.safe_load(ran.stdout)
    assert two["loss"] == pytest.approx(one.loss, abs=1e-4)
    assert two["held_out_loss"] == pytest.approx(one.held_out_loss, abs=1e-4)
    ours, theirs = (load_file(tmp_path / n / "model.safetensors") for n in ("out", "one"))
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name], tensor, atol=2e-3), name
