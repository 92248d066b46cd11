"""Two processes share the samples of a run and find what one process finds."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from patience import PATIENCE


@pytest.mark.slow
def test_two_processes_find_what_one_finds(checkpoints, data, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    two = [
        "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(port),
    ]  # fmt: skip
    words = [
        "-m", "sparsek_cli", "eval", str(checkpoints[1]), "--tasks", "recall_4,ppl,scrolls_qasper",
        "--data", str(data), "--lengths", "640", "--limit", "3", "--device", "cpu",
        "--baselines", "dense,snapkv", "max_new_tokens=6",
    ]  # fmt: skip
    root = Path(__file__).parents[3]
    path = os.pathsep.join([str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
    found = []
    for name, launcher in (("one", []), ("two", two)):
        done = subprocess.run(
            [sys.executable, *launcher, *words, "--output", str(tmp_path / name)],
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, timeout=PATIENCE,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("results: ") == 1  # one of them speaks
        report = json.loads((tmp_path / name / "results.json").read_text(encoding="utf-8"))
        assert report["complete"]
        found.append(report["units"])
    one, two = found
    assert [unit["metrics"] for unit in one] == [unit["metrics"] for unit in two]
    for mine, theirs in zip(one, two, strict=True):
        for key in ("prompts", "longest_prompt", "truncated_prompts", "kv_bytes"):
            assert mine["proof"][key] == theirs["proof"][key], (mine["task"], key)
