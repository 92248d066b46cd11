"""Pages under docs/: links lead somewhere, commands run, the CLI reference is current."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OTHERS = {"node_modules", "build", "runs"}  # beside environments, whose names begin with a dot
PAGES = sorted(
    file
    for file in ROOT.rglob("*.md")
    if not any(part in OTHERS or part.startswith(".") for part in file.relative_to(ROOT).parts)
)
GUIDES = sorted((ROOT / "docs/guides").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_sections_that_are_cited_are_there():
    """Code and pages cite sections and traps of docs/method.md by their numbers."""
    method = (ROOT / "docs/method.md").read_text(encoding="utf-8")
    sections = set(re.findall(r"^## (\d+)\.", method, re.M))
    traps = set(re.findall(r"^(\d+)\. ", method[method.index("## 4.") :], re.M))
    cited = r"[Mm]ethod(?:\.md)?,? (section|trap)s? (\d+)"
    found = 0
    for file in (*PAGES, *(f for top in ("sparsek_cli", "kernels", "tests", "experiments")
                           for f in (ROOT / top).rglob("*.py"))):  # fmt: skip
        for kind, number in re.findall(cited, file.read_text(encoding="utf-8")):
            assert number in (sections if kind == "section" else traps), f"{file}: {kind} {number}"
            found += 1
    assert found > 10 and sections and len(traps) == 9


def test_the_cli_reference_is_current():
    import cli_reference

    wanted = "run `python tools/cli_reference.py`"
    assert cli_reference.PAGE.read_text(encoding="utf-8") == cli_reference.reference(), wanted


def command_lines(page: Path) -> list[str]:
    """What stands on a page as a command of ours, in blocks and in lines."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    inline = re.findall(r"(?<!`)`(sparsek [a-z][^`]*)`(?!`)", text)
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    starts = r"(?:\S+=\S+ )*(?:sparsek|(?:python|torchrun|accelerate launch)\b.* -m sparsek_cli)"
    lines = [line for block in blocks for line in block.splitlines()]
    lines += [" ".join(line.split()) for line in inline]
    return [line for line in lines if re.match(rf"{starts} [a-z]", line)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_have_the_verbs_and_options_that_pages_say(page):
    import click
    import typer

    from sparsek_cli.app import app
    from sparsek_cli.recipes.shipped import find_recipe

    verbs = typer.main.get_command(app)
    for line in command_lines(page):
        words = shlex.split(re.split(r"[|;>]|&&", line)[0], comments=True)
        words = words[words.index("sparsek" if "sparsek" in words else "sparsek_cli") + 1 :]
        verb, context = verbs.commands.get(words[0]), click.Context(verbs)
        assert verb is not None, line
        parser = verb.make_parser(click.Context(verb, parent=context))
        try:
            given, _, _ = parser.parse_args(words[1:])
        except click.UsageError as error:
            pytest.fail(f"{line}: {error.format_message()}")
        if given.get("recipe") and not given["recipe"].endswith(".yaml"):
            find_recipe(given["recipe"], verb={"eval": "evaluate"}.get(words[0], words[0]))


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
    notebook = json.loads((ROOT / "docs/guides/first-steps.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    names: dict = {}
    for cell in cells:
        exec(compile(cell, "first-steps.ipynb", "exec"), names)
    assert names["found"].score("ppl", "dense") > 1
    assert (tmp_path / "tiny-dense" / "model.safetensors").is_file()
    read = names["session"].stats()
    assert read.context_tokens > 4000 and read.kv_bytes < read.dense_kv_bytes / 4  # a long text
