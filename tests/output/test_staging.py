"""A folder appears whole or not at all, also when the process is killed at the worst moment."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from sparsek_cli.errors import SparsekError
from sparsek_cli.output import leftovers, staging
from sparsek_cli.output.contents import MODEL
from sparsek_cli.output.staging import staged
from sparsek_cli.output.swap_folders import exchange


def fill(folder: Path, text: str) -> None:
    for name in ("config.json", "sparsek.yaml", "sparsek.safetensors"):
        (folder / name).write_text(text)


def write(out: Path, text: str, *, overwrite: bool = False) -> None:
    with staged(out, overwrite=overwrite) as folder:
        fill(folder, text)


def test_replaces_in_one_step(tmp_path):
    out = tmp_path / "out"
    write(out, "old")
    write(out, "new", overwrite=True)
    assert (out / "config.json").read_text() == "new" and os.listdir(tmp_path) == ["out"]


def test_replaces_where_names_cannot_be_exchanged(tmp_path, monkeypatch):
    monkeypatch.setattr(staging, "exchange", lambda first, second: False)
    out = tmp_path / "out"
    write(out, "old")
    write(out, "new", overwrite=True)
    assert (out / "config.json").read_text() == "new" and os.listdir(tmp_path) == ["out"]


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
def test_exchange(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert exchange(tmp_path / "a", tmp_path / "b")
    assert os.listdir(tmp_path / "a") == ["b"] and os.listdir(tmp_path / "b") == ["a"]
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "a", tmp_path / "nowhere")


def test_what_appears_meanwhile_is_left_alone(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(SparsekError, match="out-1"), staged(out) as folder:
        fill(folder, "new")
        out.mkdir()
        (out / "thesis.txt").write_text("mine")
    assert os.listdir(out) == ["thesis.txt"]
    assert (tmp_path / "out-1" / "config.json").read_text() == "new"
    write(tmp_path / "two", "old")
    with pytest.raises(SparsekError, match="two-1"), staged(tmp_path / "two", overwrite=True) as f:
        fill(f, "new")
        (tmp_path / "two" / "thesis.txt").write_text("mine")
    assert (tmp_path / "two" / "thesis.txt").read_text() == "mine"


KILLED = """
    import os, sys
    from pathlib import Path
    from sparsek_cli.output import staging
    out, moment = Path(sys.argv[1]), sys.argv[2]

    def die(*args, **kwargs):
        os.kill(os.getpid(), 9)

    if moment == "between":
        staging.exchange = lambda first, second: False
        rename = Path.rename
        def once(self, target):
            if Path(target) == out:
                die()
            return rename(self, target)
        Path.rename = once
    if moment == "after":
        staging.shutil.rmtree = die
    with staging.staged(out, overwrite=True) as folder:
        for name in ("config.json", "sparsek.yaml", "sparsek.safetensors"):
            (folder / name).write_text("new")
        if moment == "writing":
            die()
"""


@pytest.mark.parametrize(
    ("moment", "stays", "says"),
    [("writing", "old", "removed"), ("between", "old", "put back"), ("after", "new", "removed")],
)
def test_killed(tmp_path, moment, stays, says):
    out = tmp_path / "out"
    write(out, "old")
    script = tmp_path / "killed.py"
    script.write_text(textwrap.dedent(KILLED))
    done = subprocess.run([sys.executable, script, out, moment], env=os.environ | _path())
    assert done.returncode == -signal.SIGKILL
    script.unlink()
    told = []
    leftovers.clear(out, told.append)
    assert any(says in line for line in told), told
    assert (out / "config.json").read_text() == stays and os.listdir(tmp_path) == ["out"]


def test_killed_while_what_was_replaced_is_removed(tmp_path, monkeypatch):
    """OUT.part, in which results are measured, is no name that `leftovers` would remove."""
    out, part = tmp_path / "out", tmp_path / "out.part"
    write(out, "old")
    write(part, "new")

    def die(folder, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(staging.shutil, "rmtree", die)
        with pytest.raises(KeyboardInterrupt):
            staging.take_name(part, out, MODEL, overwrite=True)
    leftovers.clear(out, [].append)
    assert os.listdir(tmp_path) == ["out"] and (out / "config.json").read_text() == "new"


def _path() -> dict[str, str]:
    root = Path(__file__).parents[2]
    return {"PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")])}


def test_folders_of_living_runs_and_of_others_stay(tmp_path):
    out, told = tmp_path / "out", []
    with staged(out) as folder:
        fill(folder, "new")
        leftovers.clear(out, told.append)
        assert folder.is_dir() and not told
    others = tmp_path / ".out.abcdefgh.part"
    others.mkdir()
    (others / "thesis.txt").write_text("mine")
    leftovers.clear(out, told.append)
    assert (others / "thesis.txt").read_text() == "mine" and "look into it" in told[0]
