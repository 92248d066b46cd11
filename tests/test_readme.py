"""Every command in the README runs, among the slow tests, and what it promises is there."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> list[tuple[str, list[str]]]:
    """Each command line as it stands there, and in words."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    lines = (line for block in blocks for line in block.splitlines())
    return [(line, shlex.split(line, comments=True)) for line in lines]


@pytest.mark.parametrize("ci", ["", "true"])
def test_make_targets_exist_and_a_dry_run_runs_nothing(monkeypatch, ci):
    monkeypatch.setenv("CI", ci)
    targets = [words[1] for _, words in commands() if words[0] == "make"]
    assert targets == ["demo", "test"]
    for target in targets:
        command = ["make", "--dry-run", target, f"VLLM_VENV={ROOT}/none"]
        said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        assert (target != "test") or "if test -f" in said.stdout


@pytest.mark.slow
def test_the_lines_of_python_run(tmp_path, monkeypatch, capsys):
    """At sizes of a test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPARSEK_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    small = [("budget=512", 'budget=512, calibrate="none", device="cpu"'), ("4096", "512")]
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        for given, less in small:
            assert given in block
            block = block.replace(given, less)
        exec(compile(block, "README.md", "exec"), {})
        assert "ppl" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_session_as_it_stands_finds_the_password(tmp_path, monkeypatch, capsys):
    """Nothing dry, calibration and training whole; only samples of evaluate are fewer."""
    from sparsek_cli.app import run

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPARSEK_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("README.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path)
    said = {}
    for line, words in commands():
        if words[0] not in ("make", "sparsek"):
            subprocess.run(line, shell=True, check=True)
        elif words[0] == "sparsek":
            few = ["--limit", "1", "--device", "cpu"] if "--limit" in words else []
            assert run([*words[1:], *few]) == 0, f"{line}\n{capsys.readouterr().err}"
            printed = capsys.readouterr().out
            assert printed.strip(), f"{line} printed nothing"
            said.setdefault(words[1] if "--list" not in words[-1] else line, printed)
    assert "divergence from dense" in said["convert"] and "held-out loss" in said["finetune"]
    assert all(policy in said["evaluate"] for policy in ("dense", "window", "random"))
    assert "walnut" in said["chat"] and "FAIL" not in said["doctor"]


def test_it_can_be_read_in_one_go():
    assert len(README.splitlines()) <= 150
    first = "\n".join(README.splitlines()[:40]).lower()
    # What, on public models, how much is lost, how to try, how to serve.
    for answer in ("kv cache", "public model", "nats per token", "make demo", "serving.md"):
        assert answer in first


def test_sentences_are_short():
    prose = re.sub(r"```.*?```|<!--.*?-->|^[|#!].*?$", "", README, flags=re.DOTALL | re.MULTILINE)
    prose = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", prose)
    sentences = [part.split() for part in re.split(r"(?<=[.:!?])\s+|\n\n|\n- ", prose)]
    lengths = [len(words) for words in sentences if len(words) > 1]
    assert sum(lengths) / len(lengths) <= 15 and max(lengths) <= 30


def test_pictures_and_links_are_there():
    for place in re.findall(r"\]\(([^)]+)\)", README):
        assert place.startswith("https://") or (ROOT / place).exists(), place


def test_the_document_is_no_longer_than_tiny_reads(tmp_path):
    """Beyond its context the chat that is shown answers wrongly; CHANGELOG.md had grown so far."""
    from transformers import AutoTokenizer

    root = Path(__file__).parents[1]
    line = re.search(
        r"^\(cat README\.md;.*> document\.txt$", (root / "README.md").read_text(), re.M
    )
    command = line[0].replace("document.txt", str(tmp_path / "document.txt"))
    subprocess.run(["bash", "-c", command], cwd=root, check=True)
    tokenizer = AutoTokenizer.from_pretrained(root / "sparsek_cli" / "bundled" / "tiny")
    assert len(tokenizer((tmp_path / "document.txt").read_text()).input_ids) < 8000
