"""Pages under docs/: links lead somewhere, commands run, the CLI reference is current."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    file
    for file in ROOT.rglob("*.md")
    if not {".venv", ".git", "node_modules", "build"} & set(file.relative_to(ROOT).parts)
)
GUIDES = sorted((ROOT / "docs/guides").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_cli_reference_is_current():
    import cli_reference

    wanted = "run `python tools/cli_reference.py`"
    assert cli_reference.PAGE.read_text(encoding="utf-8") == cli_reference.reference(), wanted


@pytest.mark.slow
def test_commands_of_the_guides_run(tmp_path, monkeypatch, capsys):
    from sparsek_cli.app import run

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPARSEK_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("SPARSEK_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "my-documents").mkdir()
    (tmp_path / "my-documents/a.txt").write_text("A boat, a house and a garden. " * 3000)
    first = ["convert", "tiny", "tiny-sparsek", "--budget", "512", "--calibrate", "none"]
    assert run(first) == 0
    ran = 0
    for page in GUIDES:
        text = page.read_text(encoding="utf-8")
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
            for line in block.splitlines():
                words = shlex.split(line, comments=True)
                assert words[0] == "sparsek", line
                extra = {
                    "convert": ["--dry-run", "--overwrite"],
                    "chat": ["--prompt", "Hello", "--max-new-tokens", "1"],
                }.get(words[1], ["--dry-run"])
                assert run([*words[1:], *extra]) == 0, capsys.readouterr().err
                ran += 1
        for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            exec(compile(block, page.name, "exec"), {})
            ran += 1
    assert ran >= 5


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    import json

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPARSEK_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("SPARSEK_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("sparsek_cli.evaluation.report.plots.figures", lambda report: {})
    notebook = json.loads((ROOT / "docs/guides/first-steps.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    names: dict = {}
    for cell in cells:
        exec(compile(cell, "first-steps.ipynb", "exec"), names)
    assert names["found"].score("ppl", "dense") > 1
    assert (tmp_path / "tiny-dense" / "model.safetensors").is_file()
