"""Several processes: each does its share, and never the whole by itself."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
from patience import PATIENCE

from sparsek_cli.errors import SparsekError
from sparsek_cli.evaluation import processes


@pytest.mark.parametrize("seen", [1, 2])
def test_processes_that_do_not_find_each_other_do_not_go_on(monkeypatch, seen):
    import accelerate

    asked = []

    def accelerator(cpu):
        asked.append(cpu)
        return SimpleNamespace(process_index=0, num_processes=seen)

    monkeypatch.setattr(accelerate, "Accelerator", accelerator)
    monkeypatch.setattr(processes, "meet_others", lambda say: None)
    monkeypatch.setattr(processes, "world_size", lambda: 2)
    if seen == 2:
        assert processes.Ranks("cpu", print).count == 2
    else:
        with pytest.raises(SparsekError, match="2 processes were started, and accelerate sees 1"):
            processes.Ranks("cpu", print)
    assert asked == [True]


@pytest.mark.slow
def test_two_processes_measure_once(checkpoints, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    words = ["evaluate", str(checkpoints[1]), "--tasks", "recall_1", "--lengths", "256"]
    words += ["--limit", "3", "--baselines", "window", "--device", "cpu"]
    words += ["--output", str(tmp_path / "out")]
    launched = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    done = subprocess.run(
        [sys.executable, *launched, "-m", "sparsek_cli", *words],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("results: ") == 1
