"""Several processes: each does its share, and never the whole by itself."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
from patience import PATIENCE

import sparsek_cli as sparsek
from sparsek_cli.errors import SparsekError, UsageError
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
    assert done.stderr.count("loading ") == 1 and done.stderr.count("waiting for 2") == 1
    # lm-eval gave the process with one of the three another time to answer it.
    for unit in (tmp_path / "out" / "units").rglob("*.json"):
        assert json.loads(unit.read_text())["proof"]["prompts"] == 3
    for samples in (tmp_path / "out" / "samples").rglob("*.jsonl"):
        lines = [json.loads(line) for line in samples.read_text().splitlines()]
        assert sorted((line["doc_id"], len(line["responses"])) for line in lines) == [
            (0, 1), (1, 1), (2, 1),
        ]  # fmt: skip


def test_samples_that_do_not_go_round_are_refused(checkpoints, tmp_path, monkeypatch):
    """lm-eval gave up in the process that had none, and the others waited for it."""
    import accelerate
    import lm_eval.models.huggingface  # noqa: F401  (which keeps the class that it finds)

    monkeypatch.setattr(
        accelerate, "Accelerator", lambda cpu: SimpleNamespace(process_index=0, num_processes=3)
    )
    monkeypatch.setattr(processes, "meet_others", lambda say: None)
    monkeypatch.setattr(processes, "world_size", lambda: 3)
    settings = {"tasks": ["recall_1"], "lengths": [256], "limit": 2, "device": "cpu"}
    with pytest.raises(UsageError, match="recall_1@256: 2 samples for 3 processes") as refused:
        sparsek.evaluate(str(checkpoints[1]), **settings, out=str(tmp_path / "out"))
    assert refused.value.hint.startswith("start no more processes than there are samples")
    assert not (tmp_path / "out").exists()
