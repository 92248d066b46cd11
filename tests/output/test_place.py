"""What may be written on: absent, empty, or (given up) a folder of ours; everything else stays."""

import os
import socket
from pathlib import Path

import pytest

from sparsek_cli.errors import UsageError
from sparsek_cli.output.contents import ADAPTERS, MODEL, RESULTS, RUN, SCORERS_ALONE
from sparsek_cli.output.leftovers import make_beside
from sparsek_cli.output.place import check_file, check_folder


def a_model(folder: Path, *, recipe: str = "sparsek.yaml") -> Path:
    folder.mkdir(parents=True)
    for name in ("config.json", recipe, "sparsek.safetensors", "base-00001.safetensors",
                 "tokenizer.json", "README.md", "model.safetensors.index.json"):  # fmt: skip
        (folder / name).write_text("{}")
    return folder


def refused(out: Path, *, contents=MODEL, overwrite: bool = True, model: Path | None = None) -> str:
    with pytest.raises(UsageError) as caught:
        check_folder(out, contents, overwrite=overwrite, model=model)
    assert caught.value.hint and caught.value.exit_code == 2
    return caught.value.message


def test_absent_and_empty_folders_are_free(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("absent", "no/such/parents", "empty"):
        check_folder(tmp_path / name, MODEL, overwrite=False)


@pytest.mark.parametrize("recipe", ["sparsek.yaml", "finetune.yaml"])
def test_a_model_of_ours_is_replaced_when_given_up(tmp_path, recipe):
    out = a_model(tmp_path / "out", recipe=recipe)
    assert "exists" in refused(out, overwrite=False)
    check_folder(out, MODEL, overwrite=True)


@pytest.mark.parametrize(
    "foreign",
    ["thesis.txt", "notes/today.md", ".git/HEAD", "x.safetensors", "model-mine.safetensors",
     "tokenizer_corpus.txt", "base-old.safetensors"],
)  # fmt: skip
def test_foreign_files_are_named(tmp_path, foreign):
    out = a_model(tmp_path / "out")
    (out / foreign).parent.mkdir(exist_ok=True)
    (out / foreign).write_text("mine")
    for overwrite in (True, False):
        assert f"it holds '{Path(foreign).parts[0]}'" in refused(out, overwrite=overwrite)


@pytest.mark.parametrize("missing", ["config.json", "sparsek.yaml"])
def test_a_model_that_others_saved_is_not_replaced(tmp_path, missing):
    out = a_model(tmp_path / "out")
    (out / missing).unlink()
    assert f"it has no {missing}" in refused(out)


def test_special_files_and_links(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "fifo")
    model = a_model(tmp_path / "model")
    (tmp_path / "link").symlink_to(model)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert "is a file" in refused(tmp_path / "file")
    assert "is a FIFO" in refused(tmp_path / "fifo")
    assert "is a character device" in refused(Path(os.devnull))
    assert "is a symbolic link" in refused(tmp_path / "link")
    assert "is a symbolic link" in refused(tmp_path / "dangling")
    assert "is no folder" in refused(tmp_path / "file" / "out")
    assert "cannot be written" in refused(tmp_path / ("x" * 300))
    with socket.socket(socket.AF_UNIX) as listening:
        monkeypatch.chdir(tmp_path)  # a socket's path may be 100 characters long
        listening.bind("socket")
        assert "is a socket" in refused(tmp_path / "socket")


def test_a_name_leaves_room_for_those_beside_it(tmp_path):
    """What is staged has a longer one; it was refused after all steps of a training run."""
    for name in ("n" * 236, "語" * 78 + "nn"):
        out = tmp_path / name
        check_folder(out, MODEL, overwrite=False)
        make_beside(out, "old.").rmdir()
        assert "longer than 236 bytes" in refused(tmp_path / f"{name}n")
    for contents in (RESULTS, RUN):  # beside those nothing lies
        check_folder(tmp_path / ("n" * 241), contents, overwrite=False)


def test_folders_in_use(tmp_path, monkeypatch):
    base = a_model(tmp_path / "project" / "base")
    home, here = tmp_path / "users" / "me", tmp_path / "work" / "here"
    home.mkdir(parents=True)
    here.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    assert "the base model" in refused(base, model=base)
    assert "the base model" in refused(base.parent, model=base)
    assert "your home" in refused(home)
    assert "your home" in refused(home.parent)
    assert "the folder you are in" in refused(Path())
    assert "the folder you are in" in refused(here.parent)
    assert "root of the file system" in refused(Path("/"))
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    (tmp_path / "mounted").mkdir()
    assert "a mount point" in refused(tmp_path / "mounted")


def test_folders_of_models_get_nothing_added(tmp_path):
    """Neither the one that is read nor one of ours, whose OUT could not be replaced any more."""
    base, other = tmp_path / "base", a_model(tmp_path / "other")
    base.mkdir()
    (base / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(base)
    (tmp_path / "other-link").symlink_to(other)
    (base / "empty").mkdir()
    places = ("base/out", "base/empty", "base/no/such", "link/out", "link/empty")
    for contents in (MODEL, ADAPTERS, SCORERS_ALONE, RESULTS, RUN):
        for name in places:
            assert "inside the model's own folder" in refused(
                tmp_path / name, model=base, contents=contents
            )
        for name in ("other/out", "other/no/such", "other-link/out", "base/../other/out"):
            assert f"inside '{other}', a model that sparsek wrote" in refused(
                tmp_path / name, contents=contents
            )
    for name in places:  # of a dense model that is not read nobody knows what it is
        check_folder(tmp_path / name, MODEL, overwrite=False)
    check_folder(tmp_path / "base-sparsek", MODEL, overwrite=False, model=base)
    file = tmp_path / "x.gguf"  # such a model has no folder of its own
    file.write_bytes(b"GGUF")
    check_folder(tmp_path / "out", MODEL, overwrite=False, model=file)


def test_a_project_is_no_model(tmp_path):
    """Files of these names without weights: somebody's settings, in a folder of much else."""
    for name in ("config.json", "sparsek.yaml", "finetune.yaml", "adapter_config.json"):
        (tmp_path / name).write_text("{}")
    check_folder(tmp_path / "out", MODEL, overwrite=False)


def test_a_stray_file_of_ours_makes_no_model_of_a_workplace(tmp_path, monkeypatch):
    """One sparsek.safetensors in a home or a project refused every OUT below."""
    home, project, here = (tmp_path / name for name in ("home", "project", "here"))
    for folder in (home, project, here):
        (folder / "sub").mkdir(parents=True)
        (folder / "sparsek.safetensors").write_text("")
    assert "inside" in refused(home / "sub" / "out")
    monkeypatch.setenv("HOME", str(home))
    check_folder(home / "sub" / "out", MODEL, overwrite=False)
    assert "a folder of scorers" in refused(here / "sub" / "out")
    monkeypatch.chdir(here)
    check_folder(Path("sub/out"), MODEL, overwrite=False)
    assert "a folder of scorers" in refused(project / "sub" / "out")
    (project / "train.py").write_text("")
    check_folder(project / "sub" / "out", MODEL, overwrite=False)
    for name in ("config.json", "sparsek.yaml"):
        (project / name).write_text("{}")
    check_folder(project / "sub" / "out", MODEL, overwrite=False)
    (project / "config.json").write_text('{"model_type": "sparsek_llama"}')
    assert "a model that sparsek wrote" in refused(project / "sub" / "out")


@pytest.mark.parametrize(
    "mark",
    [
        ["sparsek.safetensors"],
        ["adapter_config.json", "finetune.yaml", "adapter_model.safetensors"],
    ],
)
def test_scorers_and_adapters_get_nothing_added(tmp_path, mark):
    for name in mark:
        (tmp_path / name).write_text("{}")
    assert "lies inside" in refused(tmp_path / "out")


def test_links_in_a_circle(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    for name in ("a", "a/out", "a/no/such"):
        refused(tmp_path / name, model=tmp_path / "model")
        refused(tmp_path / name)


def test_only_runs_of_ours_are_unfinished_runs(tmp_path):
    part = tmp_path / "out.part"
    (part / "checkpoint-2").mkdir(parents=True)
    (part / "checkpoint-2" / "trained.safetensors").write_text("")
    assert "it has no recipe.yaml" in refused(part, contents=RUN)
    (part / "recipe.yaml").write_text("seed: 0")
    check_folder(part, RUN, overwrite=True)
    (part / "thesis.txt").write_text("mine")
    assert "it holds 'thesis.txt'" in refused(part, contents=RUN)


def test_only_results_are_results(tmp_path):
    out = tmp_path / "out"
    (out / "units" / "own").mkdir(parents=True)
    (out / "units" / "own" / "ppl.json").write_text("{}")
    (out / "run.json").write_text("{}")
    check_folder(out, RESULTS, overwrite=True)
    (out / "units" / "thesis.txt").write_text("mine")
    assert "it holds 'units/thesis.txt'" in refused(out, contents=RESULTS)


def test_files(tmp_path):
    file = tmp_path / "a.yaml"
    check_file(file, overwrite=False, suffixes=(".yaml",))
    file.write_text("seed: 1")
    check_file(file, overwrite=True, suffixes=(".yaml",))
    (tmp_path / "link.yaml").symlink_to(file)
    os.mkfifo(tmp_path / "fifo.yaml")
    for name, overwrite, says in (
        ("a.yaml", False, "exists"),
        ("link.yaml", True, "is a symbolic link"),
        ("fifo.yaml", True, "is a FIFO"),
        (".", True, "is a folder"),
        ("no/such/b.yaml", True, "there is no folder"),
    ):
        with pytest.raises(UsageError, match=says):
            check_file(tmp_path / name, overwrite=overwrite, suffixes=(".yaml",))
    with pytest.raises(UsageError, match=r"does not end in \.png"):
        check_file(file, overwrite=True, suffixes=(".png",))
