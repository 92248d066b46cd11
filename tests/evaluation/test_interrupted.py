"""A real process, killed or interrupted in the middle: what is left is valid and can go on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from patience import PATIENCE

TASKS = "recall_1,recall_4,ppl"


@pytest.fixture
def start(checkpoints, data, tmp_path):
    """`start(name, *flags)`: an evaluation of 3 tasks x 3 policies in a process of its own."""
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
    running = []

    def run(name: str, *flags: str) -> subprocess.Popen:
        words = ["eval", str(checkpoints[1]), "--tasks", TASKS, "--data", str(data)]
        words += ["--lengths", "640", "--limit", "6", "--baselines", "dense,snapkv,random"]
        words += ["--output", str(tmp_path / name), "--device", "cpu", *flags]
        running.append(
            subprocess.Popen(
                [sys.executable, "-m", "sparsek_cli", *words],
                env=os.environ | {"PYTHONPATH": path},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
        return running[-1]

    yield run
    for process in running:
        if process.poll() is None:
            process.kill()
        process.communicate()


def wait_for(folder: Path, count: int, process: subprocess.Popen) -> None:
    """Until `count` results are stored."""
    deadline = time.monotonic() + PATIENCE
    while len(list(folder.glob("units/*/*.json"))) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def results(folder: Path) -> dict:
    report = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    report.pop("timings"), report["recipe"].pop("out")
    return report


@pytest.mark.slow
def test_kill_and_resume_gives_the_same_results(start, tmp_path):
    assert start("whole").wait(timeout=PATIENCE) == 0
    killed = start("killed")
    wait_for(tmp_path / "killed", 3, killed)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "killed").glob("units/*/*.json")}
    assert 3 <= len(before) < 11
    assert start("killed", "--resume").wait(timeout=PATIENCE) == 0
    assert results(tmp_path / "killed") == results(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    assert not list((tmp_path / "killed").rglob("*.part"))


# In this process: test_run.py; of a process, tests/cli/test_app.py.
@pytest.mark.slow
def test_ctrl_c_leaves_results_and_a_report(start, tmp_path):
    process = start("stopped")
    wait_for(tmp_path / "stopped", 2, process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert "go on with --resume" in said
    report = results(tmp_path / "stopped")
    assert report["complete"] is False
    assert 2 <= len(report["units"]) < 11
    page = (tmp_path / "stopped" / "report.html").read_text(encoding="utf-8")
    assert "not complete" in page
