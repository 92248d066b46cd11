"""A folder of text in which programs write, too: what they wrote is no text."""

from pathlib import Path

import pytest
from verbs import convert

from sparsek_cli.data.text.find_files import find_files
from sparsek_cli.dialogue.files import load_path
from sparsek_cli.errors import UsageError
from sparsek_cli.recipes.schema_convert import ConvertRecipe

MADE = {
    "model": ("config.json", "model.safetensors", "README.md"),
    "adapter": ("adapter_config.json", "README.md"),
    "scorers": ("sparsek.safetensors", "README.md"),
    "results": ("run.json", "units/dense/ppl.json", "samples/dense/ppl.jsonl", "report.md"),
    "run.part": ("recipe.yaml", "checkpoint-3/README.md"),
}
MINE = {
    "project": ("config.json", "a.md"),
    "notes.part": ("a.md",),
    "runs": ("run.json", "samples/a.txt"),
}


def write(folder: Path, files: tuple[str, ...]) -> None:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("words")


@pytest.mark.parametrize("kind", MADE)
def test_what_was_made_within_it_is_left_out_and_named(kind, tmp_path, caplog):
    """OUT within --data: the next run learnt its card, or failed at its samples."""
    write(tmp_path, ("a.txt",))
    write(tmp_path / "sub" / kind, MADE[kind])
    assert find_files(tmp_path) == [tmp_path / "a.txt"]
    assert f"not read: 'sub/{kind}'" in caplog.text
    (tmp_path / "a.txt").unlink()
    with pytest.raises(UsageError, match="holds no text files"):
        find_files(tmp_path)


@pytest.mark.parametrize("kind", MINE)
def test_what_only_looks_so_is_read(kind, tmp_path):
    write(tmp_path / kind, MINE[kind])
    assert len(find_files(tmp_path)) == 1


def test_who_names_it_means_it(tmp_path):
    write(tmp_path / "model", MADE["model"])
    assert find_files(tmp_path / "model") == [tmp_path / "model" / "README.md"]


def test_chat_leaves_a_converted_model_in_a_folder_out(make_checkpoint, tmp_path, caplog):
    """Its tokenizer.json alone was half a million tokens."""
    from contextlib import nullcontext
    from types import SimpleNamespace

    base, folder = make_checkpoint(tmp_path / "base"), tmp_path / "documents"
    write(folder, ("a.txt",))
    recipe = dict(model=str(base), out=str(folder / "out"), calibrate="none", topk=6, window=4)
    convert(ConvertRecipe(**recipe))
    read = []
    session = SimpleNamespace(
        moment=lambda: None, load=lambda parts, name, **rest: read.append(name) or True
    )
    progress = lambda *_: nullcontext(SimpleNamespace(advance=None))  # noqa: E731
    assert load_path(session, str(folder), progress=progress)
    assert read == ["a.txt"] and "'out'" in caplog.text
